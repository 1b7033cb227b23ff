"""A pool of Ray actors: gives them jobs, waits for their messages, and passes these to the driver.

`Placement` starts the workers and replaces those that die; `Publisher` passes on what identity
videos publish. Errors of Ray become messages or our own errors. Only public calls of Ray are used.

If one rank of a gang stops, the whole gang is killed and started again: the other ranks wait for
it inside the model, where nothing else can end them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from bachvid.errors import WorkerError
from bachvid.planning.placement import ExecutionPlan
from bachvid.planning.plan import RenderPlan
from bachvid.prompts.compose import Prompt
from bachvid.ray_backend.gang import GangWorker, Rank, Stream, first_line
from bachvid.ray_backend.placement import Placement
from bachvid.ray_backend.publisher import Publisher
from bachvid.ray_backend.worker import Note
from bachvid.scheduling.pool import (
    Broken,
    CacheLost,
    Finished,
    Job,
    JobLost,
    Message,
    Previewed,
    Recorded,
    Stepped,
    WorkerLost,
)
from bachvid.scheduling.schedule import Slot

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2  # how long a cancelled render may take to notice


class RayPool:
    """Workers on a cluster that `ray.init` has been called for.

    Raises WorkerError if no worker can be placed within `cluster.wait_seconds`.
    """

    def __init__(self, plan: RenderPlan, execution: ExecutionPlan) -> None:
        self._plan = plan
        self._publisher = Publisher(plan, execution)
        self._placement = Placement(plan.config, execution)
        self._embeds: dict[str, ray.ObjectRef[Any]] = {}
        self._next_number = 0

    @property
    def idle(self) -> Sequence[Slot]:
        """Workers whose model is loaded and that have no job."""
        return self._placement.idle

    @property
    def num_workers(self) -> int:
        """Workers that are alive or being started."""
        return len(self._placement.workers)

    @property
    def is_growing(self) -> bool:
        """Whether a worker is being placed, loads its model, or ends a job that is over."""
        return any(
            worker.provenance is None or (worker.stream is not None and worker.stream.is_over)
            for worker in self._placement.workers.values()
        )

    def encode(self, prompts: Sequence[Prompt]) -> Sequence[Message]:
        """Encode the prompts on one worker, on another one if it dies. Raises WorkerError."""
        negative = Prompt(self._plan.config.sampling.negative_prompt)
        texts = {p.text: p for p in (negative, *prompts) if p.text not in self._embeds}
        messages: list[Message] = []
        while texts:
            while not self.idle:
                messages += self.wait()
            worker = self._placement.workers[self.idle[0].worker]
            encode = worker.ranks[0].actor.encode.options(num_returns="streaming")
            try:
                for ref in encode.remote(list(texts.values())):
                    # Put again by the driver: with it alone they are lost, on whatever node.
                    self._embeds[next(iter(texts))] = ray.put(ray.get(ref))
                    del texts[next(iter(texts))]
            except RayActorError:
                messages += self._lost(worker)
            except RayError as error:
                raise WorkerError(
                    f"the prompts could not be encoded: {first_line(error)}; render again"
                ) from error
        return messages

    def start(self, worker: int, job: Job) -> None:
        """Give a job to an idle worker, and to a frame video all pieces that are there for it."""
        number, self._next_number = self._next_number, self._next_number + 1
        gang, scene = self._placement.workers[worker], job.scene.scene.id
        texts = (job.video.prompt.text, self._plan.config.sampling.negative_prompt)
        embeds = {text: self._embeds[text] for text in texts}
        given = self._publisher.open(number, job)
        items = {}
        for rank in gang.ranks:
            method = rank.actor.identity if job.is_identity else rank.actor.frame
            render = method.options(num_returns="streaming")
            items[rank.index] = render.remote(number, scene, job.video, embeds, **given)
        gang.begin(Stream(number, job), items)
        if not job.is_identity:
            self._publisher.join(gang)
        logger.info("started scene=%s video=%s worker=%d", scene, job.video.id, worker)

    def wait(self) -> Sequence[Message]:
        """Wait for messages of any worker. Raises WorkerError when the last worker is gone."""
        self._publisher.give_credit(self._placement.workers.values())
        awaited: dict[Any, tuple[GangWorker, Rank]] = {}
        for worker in self._placement.workers.values():
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
            if worker.id not in self._placement.workers:  # given up because of an item before
                continue
            try:
                if rank.starting is not None:
                    messages += self._placement.advance(worker, rank)
                else:
                    messages += self._advance(worker, rank)
            except RayActorError:
                messages += self._lost(worker)
        self._placement.give_up_on_unplaced()
        return messages

    def abort(self, job: Job) -> None:
        """End a running job after its step; its worker is idle then."""
        for worker in list(self._placement.workers.values()):
            stream = worker.stream
            if stream is not None and stream.job == job and not stream.is_over:
                self._publisher.leave(worker, job)
                stream.is_over = True
                if worker.is_gang:
                    self._placement.replace(worker)
                else:
                    worker.send(abort=True)

    def forget(self, scene: str) -> None:
        """Free the identity cache of a scene."""
        self._publisher.forget(scene)

    def close(self) -> None:
        """Kill the workers and give back what they held."""
        self._placement.close()
        self._publisher.close()
        self._embeds.clear()

    def _advance(self, worker: GangWorker, rank: Rank) -> list[Message]:
        """Take the next item of a rank's stream. Raises RayActorError if the rank died."""
        stream = worker.stream
        assert stream is not None
        assert rank.items is not None
        try:
            ref = next(rank.items)
            announced, rank.follows = rank.follows, None
            rank.published = ref if announced else None
            if announced is not None:  # never fetched here: the driver has no torch
                if stream.is_over or not self._publisher.publish(stream, rank, announced, ref):
                    return []
                return [Recorded(stream.job, self._plan.cache_bytes)]
            note: Note = ray.get(ref)
        except StopIteration:
            return self._ended(worker, rank)
        except RayActorError:
            raise
        except RayError as error:
            return self._broken(worker, f"its worker failed: {first_line(error)}")
        return [] if stream.is_over else self._heard(worker, rank, note)

    def _ended(self, worker: GangWorker, rank: Rank) -> list[Message]:
        """Free a worker once all its streams end. Report why, if this one was cut short.

        Raises RayActorError if the rank died between announcing an item and making it.
        """
        stream = worker.stream
        assert stream is not None
        if stream.is_over or rank.over is not None:
            rank.items = None
            if all(rank.items is None for rank in worker.ranks):
                worker.stream = None
            return []
        reason = "no reason given"
        assert rank.published is not None
        try:
            ray.get(rank.published)  # it is the error that ended the stream
        except RayActorError:
            raise
        except RayError as error:
            reason = first_line(error)
        return self._broken(
            worker,
            f"its keys and values cannot be stored: {reason}; make room in the object store or on "
            f"the disk of its node, or set cache.policy=window, which needs less; then render "
            f"again",
        )

    def _broken(self, worker: GangWorker, reason: str) -> list[Message]:
        """Give up a job that failed. A lone worker goes on; a gang is started again."""
        stream = worker.stream
        assert stream is not None
        worker.stream = None
        for rank in worker.ranks:
            rank.items = None
        self._publisher.leave(worker, stream.job)
        if worker.is_gang:
            self._placement.replace(worker)
        return [] if stream.is_over else [Broken(stream.job, reason)]

    def _heard(self, worker: GangWorker, rank: Rank, note: Note) -> list[Message]:
        """Turn a note of a running job into messages."""
        assert worker.stream is not None
        job = worker.stream.job
        if note.step is not None:
            if not job.is_identity:
                self._publisher.stepped(worker, job, note.step)
            return [Stepped(job, note.step)]
        if note.preview is not None:
            return [Previewed(job, note.preview.frames)]
        if note.part is not None or note.has_cache:
            rank.follows = note
            return []
        if note.error is not None and not worker.is_alive():
            return self._lost(worker)  # what it says is what the death of another did to it
        rank.over = note
        if note.is_over and any(rank.over is None for rank in worker.ranks):
            return []
        return self._over(worker, note)

    def _over(self, worker: GangWorker, note: Note) -> list[Message]:
        """Close a job at the last note of its last rank, or at the first note of a failure."""
        stream = worker.stream
        assert stream is not None
        job = stream.job
        stream.is_over = True
        self._publisher.leave(worker, job)
        if note.is_over:
            said = worker.ranks[0].over
            assert said is not None
            assert said.rendered is not None
            assert worker.provenance is not None
            self._placement.succeeded()
            return [Finished(job, said.rendered, worker.provenance, said.waited)]
        if worker.is_gang:
            self._placement.replace(worker)
        if note.lost is not None:
            return self._cache_lost(stream, note.lost)
        assert note.error is not None
        return [Broken(job, note.error)]

    def _lost(self, worker: GangWorker) -> list[Message]:
        """Replace a worker of which a rank died, and report the job that was lost with it."""
        reason = f"died ({worker.where()}): killed, out of memory, or the node is gone"
        self._placement.lose(worker, reason)
        messages: list[Message] = [WorkerLost(worker.id, reason)]
        stream = worker.stream
        if stream is not None and not stream.is_over:
            self._publisher.leave(worker, stream.job)
            messages.append(JobLost(stream.job, f"its worker {reason}"))
        return messages

    def _cache_lost(self, stream: Stream, reason: str) -> list[Message]:
        """Forget the cache of a scene; its identity video, if it runs, must begin again."""
        job = stream.job
        if self._publisher.is_outdated(stream):  # it had read what is being published again
            return [JobLost(job, reason)]
        self._publisher.clear(job)
        messages: list[Message] = [CacheLost(job, reason)]
        for worker in list(self._placement.workers.values()):
            other = worker.stream
            if other is None or other.is_over or not other.job.is_identity:
                continue
            if other.job.scene is job.scene:
                self.abort(other.job)
                messages.append(JobLost(other.job, "what it had published is lost"))
        return messages
