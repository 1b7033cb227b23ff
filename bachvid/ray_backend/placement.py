"""Starts the workers of a render and replaces those that die.

A worker is placed, then loads its model, then is idle. `RayPool` awaits both steps, and tells the
placement of their end (`advance`) and of every death (`lose`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bachvid.errors import BachvidError, WorkerError
from bachvid.planning.config import ResolvedConfig
from bachvid.planning.placement import ExecutionPlan
from bachvid.ray_backend.gang import GangWorker, Place, Rank, first_line
from bachvid.scheduling.pool import WorkerPlaced
from bachvid.scheduling.schedule import Kind, Slot

logger = logging.getLogger(__name__)

_MOST_LOSSES_IN_A_ROW = 10  # of workers, before somebody must look at it


class Placement:
    """The workers of one render, on a cluster that `ray.init` has been called for.

    Raises WorkerError if not even the first one is placed within `cluster.wait_seconds`.
    """

    def __init__(self, config: ResolvedConfig, execution: ExecutionPlan) -> None:
        self._settings, self._execution = config.cluster, execution
        if config.model.threads is None:
            share = config.model.model_copy(update={"threads": self._settings.cpus_per_worker})
            config = config.model_copy(update={"model": share})
        self._config = config
        bundle = {"CPU": self._settings.cpus_per_worker, "GPU": execution.gpus_per_worker}
        self._resources = {name: count for name, count in bundle.items() if count}
        self._workers: dict[int, GangWorker] = {}
        self._places: list[Place] = []
        self._next_worker = self._losses = 0
        try:
            self._spawn_all()
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> Mapping[int, GangWorker]:
        """Workers that are alive or being started, by their number."""
        return self._workers

    @property
    def idle(self) -> Sequence[Slot]:
        """Workers whose model is loaded and that have no job."""
        return [
            Slot(worker.id, worker.node, worker.place.kind)
            for worker in self._workers.values()
            if worker.provenance is not None and worker.stream is None
        ]

    def advance(self, worker: GangWorker, rank: Rank) -> list[WorkerPlaced]:
        """Go on with a rank whose `rank.starting` ended: it is placed, or has its model.

        Raises RayActorError if the rank died, and WorkerError or its own error if it cannot load
        the model.
        """
        assert rank.starting is not None
        try:
            answer = ray.get(rank.starting)
        except RayActorError:
            raise
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, BachvidError):  # in words already: a damaged file, say
                raise cause from error
            raise WorkerError(f"a worker could not load the model: {first_line(error)}") from error
        rank.starting = None
        if rank.pid:
            rank.provenance = answer
            if not worker.is_starting:
                logger.info("worker ready id=%d", worker.id)
            return []
        worker.node, rank.pid = answer
        if not worker.is_starting:
            worker.load()
        placed = WorkerPlaced(worker.id, rank.index, worker.node, rank.pid)
        logger.info("worker placed id=%d rank=%d node=%s pid=%d", *astuple(placed))
        return [placed]

    def replace(self, worker: GangWorker) -> None:
        """Kill a worker and start another in its place, or anywhere if it was tied to a node."""
        worker.kill()
        del self._workers[worker.id]
        worker.place.strategy = "DEFAULT"
        self._spawn(worker.place)

    def lose(self, worker: GangWorker, reason: str) -> None:
        """Replace a worker that died. Raises WorkerError if too many did, one after another."""
        logger.warning("worker lost id=%d: %s", worker.id, reason)
        self._losses += 1
        if self._losses > _MOST_LOSSES_IN_A_ROW:
            raise WorkerError(
                f"{self._losses} workers died one after another and none rendered a video; the "
                f"last one {reason}. What is done is kept: see the log of that node (as in "
                f"/tmp/ray/session_latest/logs), then render again"
            )
        self.replace(worker)

    def succeeded(self) -> None:
        """Note that a worker has rendered a video, which ends a row of losses."""
        self._losses = 0

    def give_up_on_unplaced(self) -> None:
        """Go on without workers that found no place in time. Raises WorkerError if none did."""
        late = [
            worker
            for worker in self._workers.values()
            if not worker.is_placed
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

    def close(self) -> None:
        """Kill the workers and give back their places."""
        for worker in self._workers.values():
            worker.kill()
        self._workers.clear()
        for place in self._places:
            place.give_back()

    def _spawn_all(self) -> None:
        """Start all workers, the first one where Ray finds room for the identity's gang."""
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

    def _spawn(self, place: Place) -> None:
        self._workers[self._next_worker] = GangWorker(self._next_worker, self._config, place)
        self._next_worker += 1

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
