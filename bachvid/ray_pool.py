"""A pool of Ray actors: placed, started again when they die, and fed with what they read.

The driver's process owns all that workers publish: keys and values are items of a streaming
generator, so they outlive the worker that made them (what an actor itself puts into the store
dies with it). Only public Ray calls. What Ray raises becomes a message or one of our errors.

Longer than most files: placing, feeding and losing workers are one state machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from bachvid.cluster import ExecutionPlan
from bachvid.config import RenderConfig, read_steps
from bachvid.errors import BachvidError, WorkerError
from bachvid.plan import RenderPlan
from bachvid.pool import (
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
from bachvid.prompts import Prompt
from bachvid.publication import Publication
from bachvid.ray_worker import Note, RayWorker
from bachvid.schedule import Slot

logger = logging.getLogger(__name__)

# Never started again by Ray: a worker that comes back has no model and no job.
_remote: Any = ray.remote  # its types do not know concurrency groups
_ACTOR = _remote(concurrency_groups={"control": 1}, max_restarts=0, max_task_retries=0)(RayWorker)
_POLL_SECONDS = 0.2  # how long a cancelled render may take to notice
_MOST_LOSSES_IN_A_ROW = 10  # of workers, before somebody must look at it


@dataclass(slots=True)
class _Stream:
    """A job on its worker. `follows` announces that the next item is no note; `published` was one.

    The last item of a stream that is cut short is an error, also where it was announced as more.
    """

    number: int
    job: Job
    items: Iterator[ray.ObjectRef[Any]]
    follows: Note | None = None
    published: ray.ObjectRef[Any] | None = None
    is_aborted: bool = False
    credit: int = 0


@dataclass(slots=True)
class _Worker:
    """An actor. `starting` is the call that is awaited while it is placed, then loads."""

    id: int
    actor: Any
    strategy: Any
    starting: ray.ObjectRef[Any] | None
    since: float
    node: str = ""
    pid: int = 0
    made_with: Mapping[str, str] | None = None
    stream: _Stream | None = None


@dataclass(slots=True)
class _Scene:
    """A scene's publication; jobs read by their number.

    `identity` is the number of the job that publishes it, or was the last one to do so.
    """

    publication: Publication[int, ray.ObjectRef[Any]]
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
        self._workers: dict[int, _Worker] = {}
        self._scenes: dict[str, _Scene] = {}
        self._embeds: dict[str, ray.ObjectRef[Any]] = {}
        self._next_worker = self._next_number = self._losses = 0
        bundle = {"CPU": self._settings.cpus_per_worker, "GPU": execution.gpus_per_worker}
        self._resources = {name: count for name, count in bundle.items() if count}
        # The gang of an identity video. Ray places it, and again if its node is lost.
        self._gang: PlacementGroup = placement_group([self._resources], strategy="STRICT_PACK")
        if not self._gang.wait(self._settings.wait_seconds):
            remove_placement_group(self._gang)
            raise self._no_place()
        places = {node.id: node.workers for node in execution.nodes}
        (home,) = placement_group_table(self._gang)["bundles_to_node_id"].values()
        places[home if home in places else execution.nodes[-1].id] -= 1
        self._spawn(PlacementGroupSchedulingStrategy(self._gang, placement_group_bundle_index=0))
        for node, count in sorted(places.items(), key=lambda place: place[0] != home):
            for _ in range(count):
                self._spawn(NodeAffinitySchedulingStrategy(node, soft=True))

    @property
    def idle(self) -> Sequence[Slot]:
        """Workers whose model is loaded and that have no job."""
        return [
            Slot(worker.id, worker.node)
            for worker in self._workers.values()
            if worker.starting is None and worker.stream is None
        ]

    @property
    def num_workers(self) -> int:
        """Workers that are alive or being started."""
        return len(self._workers)

    @property
    def is_growing(self) -> bool:
        """Whether a worker is being placed, loads its model, or ends a job that is over."""
        return any(
            worker.starting is not None or (worker.stream is not None and worker.stream.is_aborted)
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
            encode = worker.actor.encode.options(num_returns="streaming")
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
        actor = self._workers[worker].actor
        is_window = self._execution.policy == "window"
        texts = (job.video.prompt.text, self._plan.config.sampling.negative_prompt)
        given = (
            number,
            job.scene.scene.id,
            job.video,
            {text: self._embeds[text] for text in texts},
        )
        scene = self._scene_of(job)
        if job.is_identity:
            scene.clear()  # it may be gone with the worker that published it
            scene.identity = number
            items = actor.identity.options(num_returns="streaming").remote(
                *given, records=scene.publication.records, first=scene.publication.dropped
            )
        else:
            items = actor.frame.options(num_returns="streaming").remote(
                *given, is_window=is_window, cache_bytes=self._plan.cache_bytes
            )
            scene.publication.join(number)
            if scene.cache is not None:
                actor.send.remote(number, cache=[scene.cache])
            keys = scene.publication.keys
            parts = {keys[part]: ref for part, ref in scene.publication.parts.items()}
            actor.send.remote(number, parts=parts)
        self._workers[worker].stream = _Stream(number, job, items)
        logger.info("started scene=%s video=%s worker=%d", given[1], job.video.id, worker)

    def wait(self) -> Sequence[Message]:
        """Wait for what any worker says. Raises WorkerError when the last one is gone."""
        self._give_credit()
        awaited: dict[Any, _Worker] = {}
        for worker in self._workers.values():
            if worker.starting is not None:
                awaited[worker.starting] = worker
            elif worker.stream is not None:
                awaited[worker.stream.items] = worker
        ready, _ = ray.wait(list(awaited), timeout=_POLL_SECONDS, fetch_local=False)
        if len(awaited) > 1:
            ready, _ = ray.wait(
                list(awaited), num_returns=len(awaited), timeout=0, fetch_local=False
            )
        messages: list[Message] = []
        for item in ready:
            worker = awaited[item]
            if worker.id in self._workers:  # not given up because of an item before
                messages += self._started(worker) if worker.starting else self._advance(worker)
        self._give_up_on_unplaced()
        return messages

    def abort(self, job: Job) -> None:
        """End a running job after its step; its worker is idle then."""
        for worker in self._workers.values():
            stream = worker.stream
            if stream is not None and stream.job == job and not stream.is_aborted:
                stream.is_aborted = True
                worker.actor.send.remote(stream.number, abort=True)
                self._leave(stream)

    def forget(self, scene: str) -> None:
        """Free the identity cache of a scene."""
        self._scenes.pop(scene, None)

    def close(self) -> None:
        """Kill the workers and give back what they held."""
        for worker in self._workers.values():
            ray.kill(worker.actor)
        self._workers.clear()
        self._scenes.clear()
        self._embeds.clear()
        remove_placement_group(self._gang)

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
                worker.actor.send.remote(stream.number, credit=credit)

    def _advance(self, worker: _Worker) -> list[Message]:
        """Take the next item of a worker's stream, which is there."""
        stream = worker.stream
        assert stream is not None
        try:
            ref = next(stream.items)
            announced, stream.follows = stream.follows, None
            stream.published = ref if announced else None
            if announced is not None:
                return [] if stream.is_aborted else self._published(stream, announced, ref)
            note: Note = ray.get(ref)
        except StopIteration:
            return self._ended(worker, stream)
        except RayActorError:
            return self._lost(worker)
        except RayError as error:
            worker.stream = None
            self._leave(stream)
            broken = Broken(stream.job, f"its worker failed: {_reason(error)}")
            return [] if stream.is_aborted else [broken]
        if stream.is_aborted:
            return []
        return self._heard(worker, stream, note)

    def _ended(self, worker: _Worker, stream: _Stream) -> list[Message]:
        """Free a worker whose stream is over; one that was cut short says why in its last item."""
        reason = "no reason given"
        if not stream.is_aborted:
            assert stream.published is not None
            try:
                ray.get(stream.published)
            except RayActorError:  # it died between announcing the item and making it
                return self._lost(worker)
            except RayError as error:
                reason = _reason(error)
        worker.stream = None
        if stream.is_aborted:
            return []
        self._leave(stream)
        broken = (
            f"its keys and values cannot be stored: {reason}; make room in the object store or on "
            f"the disk of its node, or set cache.policy=window, which needs less; then render again"
        )
        return [Broken(stream.job, broken)]

    def _heard(self, worker: _Worker, stream: _Stream, note: Note) -> list[Message]:
        job = stream.job
        if note.step is not None:
            if not job.is_identity:
                self._scene_of(job).publication.stepped(stream.number, note.step)
            return [Stepped(job, note.step)]
        if note.preview is not None:
            return [Previewed(job, note.preview.frames)]
        if note.part is not None or note.has_cache:
            stream.follows = note
            return []
        stream.is_aborted = True  # nothing more is to come but the end of the stream
        self._leave(stream)
        if note.rendered is not None:
            assert worker.made_with is not None
            self._losses = 0
            names = (job.scene.scene.id, job.video.id)
            logger.info("rendered scene=%s video=%s waited=%.3f", *names, note.waited)
            return [Finished(job, note.rendered, worker.made_with)]
        if note.lost is not None:
            return self._cache_lost(stream, note.lost)
        assert note.error is not None
        return [Broken(job, note.error)]

    def _published(
        self, stream: _Stream, announced: Note, ref: ray.ObjectRef[Any]
    ) -> list[Message]:
        """Keep what an identity video published, and give it to those who read it."""
        scene = self._scene_of(stream.job)
        num_parts = scene.publication.num_parts
        is_last = announced.has_cache if num_parts == 0 else announced.part == num_parts - 1
        if announced.has_cache:
            scene.cache = ref
            what: dict[str, Any] = {"cache": [ref]}
        else:
            assert announced.part is not None
            scene.publication.publish(announced.part, ref)
            what = {"parts": {scene.publication.keys[announced.part]: ref}}
        for worker in self._workers.values():
            reader = worker.stream
            if reader is not None and reader.number in scene.publication.readers:
                worker.actor.send.remote(reader.number, **what)
        return [Recorded(stream.job, self._plan.cache_bytes)] if is_last else []

    def _cache_lost(self, stream: _Stream, reason: str) -> list[Message]:
        """Forget the cache of a scene; its identity video, if it runs, must begin again."""
        job, scene = stream.job, self._scene_of(stream.job)
        if stream.number < scene.identity:  # it had read what is being published again already
            return [WorkerLost(job, reason)]
        scene.clear()
        messages: list[Message] = [CacheLost(job, reason)]
        for worker in self._workers.values():
            other = worker.stream
            if other is None or other.is_aborted or not other.job.is_identity:
                continue
            if other.job.scene is job.scene:
                self.abort(other.job)
                messages.append(WorkerLost(other.job, "what it had published is lost"))
        return messages

    def _leave(self, stream: _Stream) -> None:
        known = self._scenes.get(stream.job.scene.scene.id)
        if known is not None:
            known.publication.leave(stream.number)

    def _spawn(self, strategy: Any) -> None:
        """Start a worker; `wait` takes it in when it is placed and loaded."""
        config: RenderConfig = self._plan.config
        if config.model.threads is None:
            share = config.model.model_copy(update={"threads": self._settings.cpus_per_worker})
            config = config.model_copy(update={"model": share})
        actor = _ACTOR.options(
            num_cpus=self._resources["CPU"],
            num_gpus=self._resources.get("GPU", 0),
            scheduling_strategy=strategy,
        ).remote(config)
        worker = _Worker(self._next_worker, actor, strategy, actor.place.remote(), time.monotonic())
        self._workers[worker.id] = worker
        self._next_worker += 1

    def _started(self, worker: _Worker) -> list[Message]:
        """Go on with a worker that is placed, or that has loaded its model."""
        assert worker.starting is not None
        try:
            answer = ray.get(worker.starting)
        except RayActorError:
            return self._lost(worker)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, BachvidError):  # in words already: a damaged file, say
                raise cause from error
            raise WorkerError(f"a worker could not load the model: {_reason(error)}") from error
        if not worker.node:
            worker.node, worker.pid = answer
            worker.starting = worker.actor.load.remote()
            logger.info("worker placed id=%d node=%s pid=%d", worker.id, worker.node, worker.pid)
        else:
            worker.made_with, worker.starting = answer, None
            logger.info("worker ready id=%d", worker.id)
        return []

    def _lost(self, worker: _Worker) -> list[Message]:
        """Replace a dead worker, wherever there is room, and say which job died with it."""
        where = f"process {worker.pid} on node {worker.node[:8]}" if worker.node else "starting"
        reason = f"its worker died ({where}): killed, out of memory, or the node is gone"
        logger.warning("worker lost id=%d: %s", worker.id, reason)
        del self._workers[worker.id]
        self._losses += 1
        if self._losses > _MOST_LOSSES_IN_A_ROW:
            raise WorkerError(
                f"{self._losses} workers died one after another and none rendered a video; of the "
                f"last one: {reason}. What is done is kept: see the log of that node (as in "
                f"/tmp/ray/session_latest/logs), then render again"
            )
        is_gang = isinstance(worker.strategy, PlacementGroupSchedulingStrategy)
        self._spawn(worker.strategy if is_gang else "DEFAULT")
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
            if not worker.node and time.monotonic() - worker.since > self._settings.wait_seconds
        ]
        for worker in late:
            logger.warning("worker not placed id=%d wants=%s", worker.id, self._resources)
            ray.kill(worker.actor)
            del self._workers[worker.id]
        if not self._workers:
            raise self._no_place()

    def _no_place(self) -> WorkerError:
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        return WorkerError(
            f"no worker found a place in {self._settings.wait_seconds:g} s: each needs "
            f"{self._resources}, free on the whole cluster are {free}; wait for other jobs, "
            f"ask for less (cluster.cpus_per_worker, cluster.gpus_per_worker), or wait longer "
            f"(cluster.wait_seconds)"
        )


def _reason(error: RayError) -> str:
    """Give the first line of what went wrong in a worker, without Ray's frame around it."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip() or 'no reason given'}".split("\n")[0]
