"""A pool of Ray actors: placed, started again when they die, and fed with what they read.

The driver's process owns all that workers publish: keys and values are items of a streaming
generator, so they outlive the worker that made them (what an actor itself puts into the store
dies with it). Only public Ray calls. What Ray raises becomes a message or one of our errors.

A gang whose ranks do not all go on is killed and started anew: the others wait for it inside the
model, where nothing can end them.

Longer than most files: placing, feeding and losing workers are one state machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bachvid.errors import BachvidError, WorkerError
from bachvid.inputs.config import RenderConfig
from bachvid.inputs.runs import read_steps
from bachvid.layout.gangs import BRANCHES, overlapping_ranks
from bachvid.planning.placement import ExecutionPlan
from bachvid.planning.plan import RenderPlan
from bachvid.prompts.compose import Prompt
from bachvid.ray_backend.gang import GangWorker, Place, Rank, Stream
from bachvid.ray_backend.worker import Note
from bachvid.scheduling.pool import (
    Broken,
    CacheLost,
    Finished,
    Job,
    Message,
    Previewed,
    Recorded,
    Stepped,
    WorkerLost,
)
from bachvid.scheduling.publication import Publication
from bachvid.scheduling.schedule import Kind, Slot

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10  # for a rank to say that it lives
_POLL_SECONDS = 0.2  # how long a cancelled render may take to notice
_MOST_LOSSES_IN_A_ROW = 10  # of workers, before somebody must look at it

Refs = Mapping[int, ray.ObjectRef[Any]]  # of one part, by the rank that published it


@dataclass(slots=True)
class _Scene:
    """A scene's publication; jobs read by their number.

    `identity` is the number of the job that publishes it, or was the last one to do so.
    """

    publication: Publication[int, Refs]
    cache: ray.ObjectRef[Any] | None = None
    identity: int = -1

    def clear(self) -> None:
        """Forget what was published: it is lost, or about to be published again."""
        self.publication.clear()
        self.cache = None


class RayPool:
    """Workers on a cluster that `ray.init` has been called for.

    Raises WorkerError if no worker can be placed within `cluster.wait_seconds`.
    """

    def __init__(self, plan: RenderPlan, execution: ExecutionPlan) -> None:
        self._plan, self._execution = plan, execution
        self._reads = read_steps(plan.config.method)
        self._settings = plan.config.cluster
        self._workers: dict[int, GangWorker] = {}
        self._scenes: dict[str, _Scene] = {}
        self._embeds: dict[str, ray.ObjectRef[Any]] = {}
        self._next_worker = self._next_number = self._losses = 0
        self._plan_sources()
        bundle = {"CPU": self._settings.cpus_per_worker, "GPU": execution.gpus_per_worker}
        self._resources = {name: count for name, count in bundle.items() if count}
        self._places: list[Place] = []
        try:
            self._spawn_all()
        except BaseException:
            self.close()
            raise

    def _plan_sources(self) -> None:
        """Find which ranks of an identity gang record, and what each reading rank reads of them."""
        heads = self._plan.facts.num_heads
        writers = self._execution.identity.shares(heads)
        branches = BRANCHES if self._plan.config.method.branches == "both" else ("cond",)
        self._recorders = [i for i, w in enumerate(writers) if set(w.branches) & set(branches)]
        self._sources = [
            overlapping_ranks(reader, writers, branches)
            for reader in self._execution.frame.shares(heads)
        ]

    def _spawn_all(self) -> None:
        execution, gang = self._execution, self._execution.frame
        kinds: tuple[Kind, Kind] = ("identity", "frame") if execution.is_split else ("any", "any")
        first = Place.on_one_node(kinds[0], execution.identity, self._resources)
        self._places.append(first)
        assert first.group is not None
        if not first.group.wait(self._settings.wait_seconds):
            raise self._no_place()
        (home, *_) = placement_group_table(first.group)["bundles_to_node_id"].values()
        places = {node.id: node.workers for node in execution.nodes}
        places[home if home in places else execution.nodes[-1].id] -= 1
        self._spawn(first)
        for node, count in sorted(places.items(), key=lambda place: place[0] != home):
            for _ in range(count):
                if gang.size > 1:
                    place = Place.on_one_node(kinds[1], gang, self._resources)
                else:
                    here = NodeAffinitySchedulingStrategy(node, soft=True)
                    place = Place(kinds[1], gang, self._resources, here)
                self._places.append(place)
                self._spawn(place)

    @property
    def idle(self) -> Sequence[Slot]:
        """Workers whose model is loaded and that have no job."""
        return [
            Slot(worker.id, worker.node, worker.place.kind)
            for worker in self._workers.values()
            if worker.made_with is not None and worker.stream is None
        ]

    @property
    def num_workers(self) -> int:
        """Workers that are alive or being started."""
        return len(self._workers)

    @property
    def is_growing(self) -> bool:
        """Whether a worker is being placed, loads its model, or ends a job that is over."""
        return any(
            worker.made_with is None or (worker.stream is not None and worker.stream.is_aborted)
            for worker in self._workers.values()
        )

    def encode(self, prompts: Sequence[Prompt]) -> None:
        """Encode the prompts on one worker, on another one if it dies. Raises WorkerError."""
        negative = Prompt(self._plan.config.sampling.negative_prompt)
        texts = {p.text: p for p in (negative, *prompts) if p.text not in self._embeds}
        while texts:
            while not self.idle:
                self.wait()
            worker = self._workers[self.idle[0].worker]
            encode = worker.ranks[0].actor.encode.options(num_returns="streaming")
            try:
                for ref in encode.remote(list(texts.values())):
                    # Put again by the driver: with it alone they are lost, on whatever node.
                    self._embeds[next(iter(texts))] = ray.put(ray.get(ref))
                    del texts[next(iter(texts))]
            except RayActorError:
                self._lost(worker)
            except RayError as error:
                raise WorkerError(
                    f"the prompts could not be encoded: {_reason(error)}; render again"
                ) from error

    def start(self, worker: int, job: Job) -> None:
        """Give a job to an idle worker; a frame video also all that it reads and that is there."""
        number, self._next_number = self._next_number, self._next_number + 1
        gang = self._workers[worker]
        texts = (job.video.prompt.text, self._plan.config.sampling.negative_prompt)
        embeds = {text: self._embeds[text] for text in texts}
        given = (number, job.scene.scene.id, job.video, embeds)
        scene = self._scene_of(job)
        publication = scene.publication
        options: dict[str, Any]
        if job.is_identity:
            scene.clear()  # it may be gone with the worker that published it
            scene.identity = number
            options = {"records": publication.records, "first": publication.dropped}
        else:
            is_window = self._execution.policy == "window"
            options = {"is_window": is_window, "cache_bytes": self._plan.cache_bytes}
        items = {}
        for rank in gang.ranks:
            method = rank.actor.identity if job.is_identity else rank.actor.frame
            items[rank.index] = method.options(num_returns="streaming").remote(*given, **options)
        gang.begin(Stream(number, job), items)
        if not job.is_identity:
            publication.join(number)
            if scene.cache is not None:
                self._send(gang, cache=[scene.cache])
            for part, refs in publication.parts.items():
                self._send_part(gang, publication.keys[part], refs)
        logger.info("started scene=%s video=%s worker=%d", given[1], job.video.id, worker)

    def wait(self) -> Sequence[Message]:
        """Wait for what any worker says. Raises WorkerError when the last one is gone."""
        self._give_credit()
        awaited: dict[Any, tuple[GangWorker, Rank]] = {}
        for worker in self._workers.values():
            for rank in worker.ranks:
                what = rank.starting if rank.starting is not None else rank.items
                if what is not None:
                    awaited[what] = (worker, rank)
        ready, _ = ray.wait(list(awaited), timeout=_POLL_SECONDS, fetch_local=False)
        if len(awaited) > 1:
            ready, _ = ray.wait(
                list(awaited), num_returns=len(awaited), timeout=0, fetch_local=False
            )
        messages: list[Message] = []
        for item in ready:
            worker, rank = awaited[item]
            if worker.id not in self._workers:  # given up because of an item before
                continue
            if rank.starting is not None:
                messages += self._started(worker, rank)
            elif rank.items is not None:
                messages += self._advance(worker, rank)
        self._give_up_on_unplaced()
        return messages

    def abort(self, job: Job) -> None:
        """End a running job after its step; its worker is idle then."""
        for worker in list(self._workers.values()):
            stream = worker.stream
            if stream is not None and stream.job == job and not stream.is_aborted:
                self._leave(stream)
                stream.is_aborted = True
                if worker.is_gang:
                    self._replace(worker)
                else:
                    self._send(worker, abort=True)

    def forget(self, scene: str) -> None:
        """Free the identity cache of a scene."""
        self._scenes.pop(scene, None)

    def close(self) -> None:
        """Kill the workers and give back what they held."""
        for worker in self._workers.values():
            worker.kill()
        self._workers.clear()
        self._scenes.clear()
        self._embeds.clear()
        for place in self._places:
            place.give_back()

    def _send(self, worker: GangWorker, **what: Any) -> None:
        """Send something to all ranks of a running job."""
        assert worker.stream is not None
        for rank in worker.ranks:
            rank.actor.send.remote(worker.stream.number, **what)

    def _send_part(self, reader: GangWorker, key: tuple[int, int], refs: Refs) -> None:
        """Send each rank of a frame video what it reads of a part."""
        assert reader.stream is not None
        for rank in reader.ranks:
            needed = [refs[source] for source in self._sources[rank.index]]
            rank.actor.send.remote(reader.stream.number, parts={key: needed})

    def _scene_of(self, job: Job) -> _Scene:
        """Return the scene's publication; a new one for an identity video that nobody waits for."""
        name = job.scene.scene.id
        known = self._scenes.get(name)
        is_window = self._execution.policy == "window"
        if known is None or (job.is_identity and is_window and not known.publication.readers):
            known = self._scenes[name] = _Scene(Publication(self._reads, window=self._plan.window))
        return known

    def _give_credit(self) -> None:
        """Let identity videos publish; after all of a wave are started, so that all are counted."""
        for worker in self._workers.values():
            stream = worker.stream
            if stream is None or not stream.job.is_identity or stream.is_aborted:
                continue
            credit = self._scene_of(stream.job).publication.credit
            if credit > stream.credit:
                stream.credit = credit
                self._send(worker, credit=credit)

    def _advance(self, worker: GangWorker, rank: Rank) -> list[Message]:
        """Take the next item of a rank's stream, which is there."""
        stream = worker.stream
        assert stream is not None
        assert rank.items is not None
        try:
            ref = next(rank.items)
            announced, rank.follows = rank.follows, None
            rank.published = ref if announced else None
            if announced is not None:
                return [] if stream.is_aborted else self._published(stream, rank, announced, ref)
            note: Note = ray.get(ref)
        except StopIteration:
            return self._ended(worker, rank)
        except RayActorError:
            return self._lost(worker)
        except RayError as error:
            return self._broken(worker, f"its worker failed: {_reason(error)}")
        return [] if stream.is_aborted else self._heard(worker, rank, note)

    def _ended(self, worker: GangWorker, rank: Rank) -> list[Message]:
        """Free a worker when its ranks' streams are over; one that was cut short says why."""
        stream = worker.stream
        assert stream is not None
        if stream.is_aborted or rank.over is not None:
            rank.items = None
            if all(rank.items is None for rank in worker.ranks):
                worker.stream = None
            return []
        reason = "no reason given"
        assert rank.published is not None
        try:
            ray.get(rank.published)
        except RayActorError:  # it died between announcing the item and making it
            return self._lost(worker)
        except RayError as error:
            reason = _reason(error)
        return self._broken(
            worker,
            f"its keys and values cannot be stored: {reason}; make room in the object store or on "
            f"the disk of its node, or set cache.policy=window, which needs less; then render "
            f"again",
        )

    def _broken(self, worker: GangWorker, reason: str) -> list[Message]:
        """Return up a job that failed; its worker is well, or else started anew."""
        stream = worker.stream
        assert stream is not None
        worker.stream = None
        for rank in worker.ranks:
            rank.items = None
        self._leave(stream)
        if worker.is_gang:
            self._replace(worker)
        return [] if stream.is_aborted else [Broken(stream.job, reason)]

    def _heard(self, worker: GangWorker, rank: Rank, note: Note) -> list[Message]:
        stream = worker.stream
        assert stream is not None
        job = stream.job
        if note.step is not None:
            if not job.is_identity:
                self._scene_of(job).publication.stepped(stream.number, note.step)
            return [Stepped(job, note.step)]
        if note.preview is not None:
            return [Previewed(job, note.preview.frames)]
        if note.part is not None or note.has_cache:
            rank.follows = note
            return []
        if note.error is not None and not self._all_alive(worker):
            return self._lost(worker)  # what it says is what the death of another did to it
        rank.over = note
        if note.is_over and any(rank.over is None for rank in worker.ranks):
            return []
        stream.is_aborted = True  # nothing more is to come but the end of the streams
        self._leave(stream)
        said = worker.ranks[0].over
        if note.is_over and said is not None:
            assert said.rendered is not None
            assert worker.made_with is not None
            self._losses = 0
            names = (job.scene.scene.id, job.video.id)
            logger.info("rendered scene=%s video=%s waited=%.3f", *names, said.waited)
            return [Finished(job, said.rendered, worker.made_with)]
        if worker.is_gang:
            self._replace(worker)
        if note.lost is not None:
            return self._cache_lost(stream, note.lost)
        assert note.error is not None
        return [Broken(job, note.error)]

    def _all_alive(self, worker: GangWorker) -> bool:
        """Ask the ranks of a gang whether they live; one that is alone has just said so."""
        assert worker.stream is not None
        asked = worker.ranks if worker.is_gang else []
        answers = [rank.actor.send.remote(worker.stream.number) for rank in asked]
        try:
            ray.get(answers, timeout=_ANSWER_SECONDS)
        except RayError:
            return False
        return True

    def _published(
        self, stream: Stream, rank: Rank, announced: Note, ref: ray.ObjectRef[Any]
    ) -> list[Message]:
        """Keep what an identity video published, and give it to those who read it."""
        scene = self._scene_of(stream.job)
        publication = scene.publication
        readers = [
            worker
            for worker in self._workers.values()
            if worker.stream is not None and worker.stream.number in publication.readers
        ]
        if announced.has_cache:
            scene.cache = ref
            for reader in readers:
                self._send(reader, cache=[ref])
            is_last = publication.num_parts == 0
        else:
            part = announced.part
            assert part is not None
            refs = stream.arrived.setdefault(part, {})
            refs[rank.index] = ref
            if len(refs) < len(self._recorders):
                return []
            del stream.arrived[part]
            publication.publish(part, refs)
            for reader in readers:
                self._send_part(reader, publication.keys[part], refs)
            is_last = part == publication.num_parts - 1
        return [Recorded(stream.job, self._plan.cache_bytes)] if is_last else []

    def _cache_lost(self, stream: Stream, reason: str) -> list[Message]:
        """Forget the cache of a scene; its identity video, if it runs, must begin again."""
        job, scene = stream.job, self._scene_of(stream.job)
        if stream.number < scene.identity:  # it had read what is being published again already
            return [WorkerLost(job, reason)]
        scene.clear()
        messages: list[Message] = [CacheLost(job, reason)]
        for worker in list(self._workers.values()):
            other = worker.stream
            if other is None or other.is_aborted or not other.job.is_identity:
                continue
            if other.job.scene is job.scene:
                self.abort(other.job)
                messages.append(WorkerLost(other.job, "what it had published is lost"))
        return messages

    def _leave(self, stream: Stream) -> None:
        known = self._scenes.get(stream.job.scene.scene.id)
        if known is not None:
            known.publication.leave(stream.number)

    def _spawn(self, place: Place) -> None:
        """Start a worker; `wait` takes it in when it is placed and loaded."""
        config: RenderConfig = self._plan.config
        if config.model.threads is None:
            share = config.model.model_copy(update={"threads": self._settings.cpus_per_worker})
            config = config.model_copy(update={"model": share})
        self._workers[self._next_worker] = GangWorker(self._next_worker, config, place)
        self._next_worker += 1

    def _replace(self, worker: GangWorker) -> None:
        """Kill a worker, and start another in its place, or if it was tied to a node, anywhere."""
        worker.kill()
        del self._workers[worker.id]
        worker.place.strategy = "DEFAULT"
        self._spawn(worker.place)

    def _started(self, worker: GangWorker, rank: Rank) -> list[Message]:
        """Go on with a rank that is placed, or that has loaded its model."""
        assert rank.starting is not None
        try:
            answer = ray.get(rank.starting)
        except RayActorError:
            return self._lost(worker)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, BachvidError):  # in words already: a damaged file, say
                raise cause from error
            raise WorkerError(f"a worker could not load the model: {_reason(error)}") from error
        rank.starting = None
        is_placed = bool(rank.pid)
        if not is_placed:
            worker.node, rank.pid = answer
            name = (worker.id, rank.index, worker.node, rank.pid)
            logger.info("worker placed id=%d rank=%d node=%s pid=%d", *name)
        else:
            rank.made_with = answer
        if worker.is_starting:
            return []
        if not is_placed:
            worker.load()
        else:
            logger.info("worker ready id=%d", worker.id)
        return []

    def _lost(self, worker: GangWorker) -> list[Message]:
        """Replace a worker of which a rank died, and say which job died with it."""
        reason = f"its worker died ({worker.where()}): killed, out of memory, or the node is gone"
        logger.warning("worker lost id=%d: %s", worker.id, reason)
        self._losses += 1
        if self._losses > _MOST_LOSSES_IN_A_ROW:
            raise WorkerError(
                f"{self._losses} workers died one after another and none rendered a video; of the "
                f"last one: {reason}. What is done is kept: see the log of that node (as in "
                f"/tmp/ray/session_latest/logs), then render again"
            )
        self._replace(worker)
        stream = worker.stream
        if stream is None or stream.is_aborted:
            return []
        self._leave(stream)
        return [WorkerLost(stream.job, reason)]

    def _give_up_on_unplaced(self) -> None:
        """Go on without workers that found no place in time. Raises WorkerError without any."""
        late = [
            worker
            for worker in self._workers.values()
            if not all(rank.pid for rank in worker.ranks)
            and time.monotonic() - worker.since > self._settings.wait_seconds
        ]
        for worker in late:
            logger.warning("worker not placed id=%d wants=%s", worker.id, self._resources)
            worker.kill()
            worker.place.give_back()
            self._places.remove(worker.place)
            del self._workers[worker.id]
        if not self._workers:
            raise self._no_place()

    def _no_place(self) -> WorkerError:
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        size = max(self._execution.identity.size, self._execution.frame.size)
        ranks = f"{size} times " * (size > 1)
        return WorkerError(
            f"no worker found a place in {self._settings.wait_seconds:g} s: each needs "
            f"{ranks}{self._resources}, free on the whole cluster are {free}; wait for other jobs, "
            f"ask for less (cluster.cpus_per_worker, cluster.gpus_per_worker), or wait longer "
            f"(cluster.wait_seconds)"
        )


def _reason(error: RayError) -> str:
    """Return the first line of what went wrong in a worker, without Ray's frame around it."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip() or 'no reason given'}".split("\n")[0]
