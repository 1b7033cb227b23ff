"""Passes on what identity videos publish: to its readers, at their pace, and until nobody needs it.

The driver's process owns all that is published, as items of streaming generators: so they outlive
the worker that made them, while objects that an actor puts into the store itself die with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from bachvid.engine.results import RunStep
from bachvid.layout.gangs import overlapping_ranks
from bachvid.planning.placement import ExecutionPlan
from bachvid.planning.plan import RenderPlan
from bachvid.planning.resolve import build_method
from bachvid.ray_backend.gang import GangWorker, Rank, Stream
from bachvid.ray_backend.worker import Note
from bachvid.scheduling.pool import Job
from bachvid.scheduling.publication import Publication

Refs = Mapping[int, ray.ObjectRef[Any]]  # of one part, by the rank that published it


@dataclass(slots=True)
class _Scene:
    """A scene's publication, and the workers that read it.

    `identity` is the number of the job that publishes it, or was the last one to do so.
    """

    publication: Publication[GangWorker, Refs]
    cache: ray.ObjectRef[Any] | None = None
    identity: int = -1

    def clear(self) -> None:
        """Forget what was published, because it is lost or about to be published again."""
        self.publication.clear()
        self.cache = None


class Publisher:
    """The publications of all scenes in progress."""

    def __init__(self, plan: RenderPlan, execution: ExecutionPlan) -> None:
        self._plan, self._is_window = plan, execution.policy == "window"
        self._scenes: dict[str, _Scene] = {}
        heads = plan.facts.num_heads
        writers = execution.identity.shares(heads)
        branches = build_method(plan.config).records.branches
        self._recorders = [i for i, w in enumerate(writers) if set(w.branches) & set(branches)]
        self._sources = [  # for each rank that reads, the ranks that record what it reads
            overlapping_ranks(reader, writers, branches) for reader in execution.frame.shares(heads)
        ]

    def open(self, number: int, job: Job) -> Mapping[str, Any]:
        """Return what a worker must know of the publication when it starts a job.

        These are arguments of `RayWorker.identity` or `RayWorker.frame`.
        """
        scene = self._scene_of(job)
        if not job.is_identity:
            return {"is_window": self._is_window}
        scene.clear()  # it may be gone with the worker that published it
        scene.identity = number
        publication = scene.publication
        return {"is_window": self._is_window, "first": publication.dropped}

    def join(self, reader: GangWorker) -> None:
        """Add the worker of a frame video as a reader, and send it the parts that are there."""
        assert reader.stream is not None
        scene = self._scene_of(reader.stream.job)
        scene.publication.join(reader)
        if scene.cache is not None:
            reader.send(cache=[scene.cache])
        for part, refs in scene.publication.parts.items():
            self._send_part(reader, part, refs)

    def leave(self, reader: GangWorker, job: Job) -> None:
        """Remove a worker as a reader: its job is over, or lost."""
        scene = self._scenes.get(job.scene.scene.id)
        if scene is not None:
            scene.publication.leave(reader)

    def stepped(self, reader: GangWorker, job: Job, step: RunStep) -> None:
        """Note that the worker of a frame video has done a step, and no longer needs its part."""
        self._scene_of(job).publication.stepped(reader, step)

    def give_credit(self, workers: Iterable[GangWorker]) -> None:
        """Let identity videos publish more, once a whole wave has started."""
        for worker in workers:
            stream = worker.stream
            if stream is None or not stream.job.is_identity or stream.is_over:
                continue
            credit = self._scene_of(stream.job).publication.credit
            if credit > stream.credit:
                stream.credit = credit
                worker.send(credit=credit)

    def publish(self, stream: Stream, rank: Rank, announced: Note, ref: ray.ObjectRef[Any]) -> bool:
        """Keep and send what a rank published. Return whether it was the last part.

        A part is sent when all ranks that record anything have published theirs.
        """
        scene = self._scene_of(stream.job)
        publication = scene.publication
        if announced.has_cache:
            scene.cache = ref
            for reader in publication.readers:
                reader.send(cache=[ref])
            return publication.num_parts == 0
        part = announced.part
        assert part is not None
        refs = stream.arrived.setdefault(part, {})
        refs[rank.index] = ref
        if len(refs) < len(self._recorders):
            return False
        del stream.arrived[part]
        publication.publish(part, refs)
        for reader in publication.readers:
            self._send_part(reader, part, refs)
        return part == publication.num_parts - 1

    def is_outdated(self, stream: Stream) -> bool:
        """Whether a job is older than the identity video that now publishes for its scene."""
        return stream.number < self._scene_of(stream.job).identity

    def clear(self, job: Job) -> None:
        """Forget what was published for a job's scene, which is lost. Its readers go on waiting."""
        self._scene_of(job).clear()

    def forget(self, scene: str) -> None:
        """Free all that was published for a scene."""
        self._scenes.pop(scene, None)

    def close(self) -> None:
        """Free everything."""
        self._scenes.clear()

    def _scene_of(self, job: Job) -> _Scene:
        """Return the publication of a scene, made if there is none yet."""
        name = job.scene.scene.id
        known = self._scenes.get(name)
        if known is None or (job.is_identity and self._is_window and not known.publication.readers):
            publication = Publication[GangWorker, Refs](
                self._plan.reading, window=self._plan.window
            )
            known = self._scenes[name] = _Scene(publication)
        return known

    def _send_part(self, reader: GangWorker, part: int, refs: Refs) -> None:
        """Send each rank of a frame video what it reads of a part."""
        assert reader.stream is not None
        for rank in reader.ranks:
            needed = [refs[source] for source in self._sources[rank.index]]
            rank.actor.send.remote(reader.stream.number, parts={part: needed})
