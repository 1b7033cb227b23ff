"""One worker of a Ray pool: the actors of a gang, their place, and the job that they share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bachvid.layout.gangs import Gang
from bachvid.planning.config import ResolvedConfig
from bachvid.ray_backend.worker import Note, RayWorker
from bachvid.scheduling.pool import Job
from bachvid.scheduling.schedule import Kind

# Never started again by Ray: a worker that comes back has no model and no job.
_remote: Any = ray.remote  # its types do not know concurrency groups
_ACTOR = _remote(concurrency_groups={"control": 1}, max_restarts=0, max_task_retries=0)(RayWorker)

_ANSWER_SECONDS = 10  # for a rank to say that it lives

Resources = Mapping[str, float]


@dataclass(slots=True)
class Stream:
    """A job on its worker.

    arrived: parts that some ranks, but not all, have published.
    credit: the number of parts that it may publish.
    is_over: it has reported its end or was aborted, and only the streams of its ranks must end.
    """

    number: int
    job: Job
    arrived: dict[int, dict[int, ray.ObjectRef[Any]]] = field(default_factory=dict)
    credit: int = 0
    is_over: bool = False


@dataclass(slots=True)
class Rank:
    """One actor of a gang.

    starting: the call that is awaited while it is placed, and then while it loads.
    items: its stream of notes on the job. After a note with `follows` the next item is data, as
        `published` was. A stream that is cut short ends in an error, even after such a note.
    over: its last note on the job.
    """

    index: int
    actor: Any
    starting: ray.ObjectRef[Any] | None
    pid: int = 0
    provenance: Mapping[str, str] | None = None
    items: Iterator[ray.ObjectRef[Any]] | None = None
    follows: Note | None = None
    published: ray.ObjectRef[Any] | None = None
    over: Note | None = None


@dataclass(slots=True, eq=False)
class Place:
    """Where a worker may be: the resources of each rank, and Ray's placement group or strategy."""

    kind: Kind
    gang: Gang
    resources: Resources
    strategy: Any = "DEFAULT"
    group: PlacementGroup | None = None

    @classmethod
    def on_one_node(cls, kind: Kind, gang: Gang, resources: Resources) -> Place:
        """Hold a place for all ranks on one node. Ray finds it, and again if the node is lost."""
        group = placement_group([dict(resources)] * gang.size, strategy="STRICT_PACK")
        return cls(kind, gang, resources, group=group)

    def give_back(self) -> None:
        """Release the resources of this place."""
        if self.group is not None:
            remove_placement_group(self.group)


class GangWorker:
    """The actors of one gang, started in a place."""

    def __init__(self, number: int, config: ResolvedConfig, place: Place) -> None:
        self.id, self.place = number, place
        self.since = time.monotonic()
        self.node = ""
        self.stream: Stream | None = None
        self._meeting = f"bachvid-{uuid.uuid4().hex}"  # a file where the ranks meet
        self.ranks = [self._start(config, rank) for rank in range(place.gang.size)]

    def _start(self, config: ResolvedConfig, rank: int) -> Rank:
        place = self.place
        strategy = place.strategy
        if place.group is not None:
            strategy = PlacementGroupSchedulingStrategy(
                place.group, placement_group_bundle_index=rank
            )
        actor = _ACTOR.options(
            num_cpus=place.resources["CPU"],
            num_gpus=place.resources.get("GPU", 0),
            scheduling_strategy=strategy,
        ).remote(config, place.gang, rank)
        return Rank(rank, actor, actor.place.remote())

    @property
    def is_placed(self) -> bool:
        """Whether all ranks have a process."""
        return all(rank.pid for rank in self.ranks)

    @property
    def is_starting(self) -> bool:
        """Whether a rank is being placed, or loads its model."""
        return any(rank.starting is not None for rank in self.ranks)

    @property
    def provenance(self) -> Mapping[str, str] | None:
        """Versions and device of its videos; None before all ranks have loaded their model."""
        return None if self.is_starting else self.ranks[0].provenance

    @property
    def is_gang(self) -> bool:
        """Whether it has more than one rank, in which case no rank can go on without the others."""
        return len(self.ranks) > 1

    def load(self) -> None:
        """Load the model, once all ranks are placed: loading joins them into one group."""
        for rank in self.ranks:
            rank.starting = rank.actor.load.remote(self._meeting)

    def begin(self, stream: Stream, items: Mapping[int, Iterator[ray.ObjectRef[Any]]]) -> None:
        """Take the stream of each rank for a job that it was given."""
        self.stream = stream
        for rank in self.ranks:
            rank.items, rank.follows = items[rank.index], None
            rank.published = rank.over = None

    def send(self, **what: Any) -> None:
        """Send something to all ranks of the job, as `RayWorker.send` takes it."""
        assert self.stream is not None
        for rank in self.ranks:
            rank.actor.send.remote(self.stream.number, **what)

    def is_alive(self) -> bool:
        """Ping every rank of a gang with a job; a lone worker has just answered."""
        assert self.stream is not None
        asked = self.ranks if self.is_gang else []
        answers = [rank.actor.send.remote(self.stream.number) for rank in asked]
        try:
            ray.get(answers, timeout=_ANSWER_SECONDS)
        except RayError:
            return False
        return True

    def kill(self) -> None:
        """End all ranks at once."""
        for rank in self.ranks:
            ray.kill(rank.actor)

    def where(self) -> str:
        """Return the names of its processes, for messages."""
        if not self.node:
            return "starting"
        pids = ", ".join(str(rank.pid) for rank in self.ranks)
        return f"process{'es' * self.is_gang} {pids} on node {self.node[:8]}"


def first_line(error: RayError) -> str:
    """Return the first line of a worker's error, without the text that Ray puts around it."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip() or 'no reason given'}".split("\n")[0]
