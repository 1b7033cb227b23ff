"""What a cluster has, and what a render does with it: workers, waves, bytes on every node.

Pure: no torch and no Ray. `bachvid.ray_cluster` asks a cluster; `plan_execution` is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import Literal

from bachvid.config import ClusterConfig, RenderConfig
from bachvid.errors import ConfigError
from bachvid.facts import ModelFacts
from bachvid.schedule import Policy
from bachvid.tokens import TokenLayout

Device = Literal["cpu", "cuda"]
STORE_SHARE = 0.8  # of the object store; when it is fuller than that Ray spills to disk
MAX_DEGREE = 16  # of sequence parallelism: GPUs that one machine may have
_MOST_NODES_NAMED = 8
# Rounds that `window` may take more than `retain` and still be chosen: it saves memory and disk.
_PATIENCE = 1.1


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One machine of a cluster, with all that it has, whether free or not."""

    id: str
    name: str
    cpus: int
    gpus: int
    store_bytes: int  # of its object store, in shared memory


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """The machines of a cluster that are alive."""

    nodes: tuple[NodeFacts, ...]

    @classmethod
    def from_ray(cls, nodes: Sequence[Mapping[str, object]]) -> ClusterFacts:
        """Take them from what `ray.nodes()` returns."""
        return cls(tuple(_node_from_ray(node) for node in nodes if node["Alive"]))


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What a render takes of one node. `cache_bytes` of keys and values are there at most."""

    id: str
    name: str
    workers: int
    cache_bytes: int
    store_bytes: int


@dataclass(frozen=True, slots=True)
class ParallelDegree:
    """GPUs that could share one video. `padding` tokens make its tokens divisible by them."""

    ranks: int
    padding: int


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """How a cluster renders a story.

    nodes: those with workers; the first one is where the first identity video is rendered.
    waves: under `window`, of the whole story; under `retain`, rounds in which every worker
        renders one video.
    live_scenes: under `retain`, identity caches that one node has room for.
    degrees: of sequence parallelism, legal for model and size. Only 1 is used.
    """

    nodes: tuple[NodePlan, ...]
    device: Device
    cpus_per_worker: int
    gpus_per_worker: int
    policy: Policy
    why: str
    waves: int
    live_scenes: int
    degrees: tuple[ParallelDegree, ...]

    @property
    def num_workers(self) -> int:
        """Workers on all nodes."""
        return sum(node.workers for node in self.nodes)


def plan_execution(
    cluster: ClusterFacts,
    config: RenderConfig,
    *,
    facts: ModelFacts,
    layout: TokenLayout,
    frames: Sequence[int],
    cache_bytes: int,
    num_steps: int,
) -> ExecutionPlan:
    """Decide where workers run, and how long keys and values of the identity videos are kept.

    Args:
        config: resolved.
        frames: frame videos of every scene.
        cache_bytes: keys and values of one scene, of `num_steps` steps.

    Raises:
        ConfigError: if the cluster has too little for what the config asks for.
    """
    gpus = _gpus_per_worker(cluster, config)
    placed = _place_workers(cluster, config.cluster, gpus)
    caches = _Caches(config, placed, frames, cache_bytes, num_steps)
    policy, why = caches.choose()
    return ExecutionPlan(
        nodes=tuple(
            NodePlan(n.id, n.name, workers, caches.bytes_on(workers, policy), n.store_bytes)
            for n, workers in placed
        ),
        device="cuda" if gpus else "cpu",
        cpus_per_worker=config.cluster.cpus_per_worker,
        gpus_per_worker=gpus,
        policy=policy,
        why=why,
        waves=caches.num_waves(policy),
        live_scenes=caches.live_scenes,
        degrees=parallel_degrees(facts.num_heads, layout.video_tokens),
    )


def parallel_degrees(num_heads: int, video_tokens: int) -> tuple[ParallelDegree, ...]:
    """Give the numbers of GPUs that can share a video: those that divide the attention heads.

    Tokens need not divide: they are padded at the end, and no pad is ever a key.
    """
    ranks = [n for n in range(1, min(num_heads, MAX_DEGREE) + 1) if num_heads % n == 0]
    return tuple(ParallelDegree(n, -video_tokens % n) for n in ranks)


def format_bytes(count: int) -> str:
    """Give a count of bytes in decimal units, as disks and memory are sold."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def counted(number: int, noun: str) -> str:
    """Give a number and its noun, as 1 worker or 2 workers."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _node_from_ray(node: Mapping[str, object]) -> NodeFacts:
    resources = node["Resources"]
    assert isinstance(resources, Mapping)
    return NodeFacts(
        id=str(node["NodeID"]),
        name=str(node["NodeName"]),
        cpus=int(resources.get("CPU", 0)),
        gpus=int(resources.get("GPU", 0)),
        store_bytes=int(resources.get("object_store_memory", 0)),
    )


def _gpus_per_worker(cluster: ClusterFacts, config: RenderConfig) -> int:
    device, asked = config.model.device, config.cluster.gpus_per_worker
    if (device, asked) in (("cpu", 1), ("cuda", 0)):
        raise ConfigError(
            f"cluster.gpus_per_worker: is {asked}, and model.device is {device}: on a cluster a "
            f"worker sees the GPUs that it asks for and no other; change one of them"
        )
    if asked is not None:
        return asked
    return int(device == "cuda" or (device == "auto" and any(n.gpus for n in cluster.nodes)))


def _place_workers(
    cluster: ClusterFacts, asked: ClusterConfig, gpus: int
) -> list[tuple[NodeFacts, int]]:
    """Fill the node that has most, for the identity video and its readers, then the others."""

    def room(node: NodeFacts) -> int:
        return min(node.cpus // asked.cpus_per_worker, node.gpus if gpus else node.cpus)

    nodes = sorted(cluster.nodes, key=lambda n: (-room(n), -n.store_bytes, n.name, n.id))
    total = sum(map(room, nodes))
    wanted = total if asked.workers is None else asked.workers
    if not 0 < wanted <= total:
        has = [
            f"{node.name} ({counted(node.cpus, 'CPU')}, {counted(node.gpus, 'GPU')}, room for "
            f"{room(node)})"
            for node in nodes
        ]
        each = counted(asked.cpus_per_worker, "CPU") + " and 1 GPU" * gpus
        raise ConfigError(
            f"cluster.workers: asks for {counted(max(wanted, 1), 'worker')}, each with {each}: the "
            f"cluster has room for {total}: {_first(has)}. Ask for fewer, for less each "
            f"(cluster.cpus_per_worker, cluster.gpus_per_worker), or add nodes"
        )
    placed = []
    for node in nodes:
        workers = min(room(node), wanted)
        wanted -= workers
        if workers:
            placed.append((node, workers))
    return placed


class _Caches:
    """How the identity caches of a story fit into the stores of the nodes with workers."""

    def __init__(
        self,
        config: RenderConfig,
        placed: Sequence[tuple[NodeFacts, int]],
        frames: Sequence[int],
        cache_bytes: int,
        num_steps: int,
    ) -> None:
        self._config, self._placed = config.cache, placed
        self._frames, self._cache_bytes = frames, cache_bytes
        self._num_workers = sum(workers for _, workers in placed)
        self._step_bytes = cache_bytes // max(num_steps, 1)
        self._window = min(config.cache.window, num_steps)
        self._smallest = min((node for node, _ in placed), key=lambda node: node.store_bytes)
        # A wave: the identity video, and as many frame videos as there are other workers.
        waves = sorted(1 + min(count, self._num_workers - 1) for count in frames)
        self._waves_at_once = sum(total <= self._num_workers for total in accumulate(waves))

    @property
    def live_scenes(self) -> int:
        """Caches that fit on every node, so that any can be the one of an identity video."""
        room = self._room(self._smallest) + int(self._config.spill_gb * 10**9)
        fitting = room // self._cache_bytes if self._cache_bytes else len(self._frames)
        return min(fitting, len(self._frames))

    def num_waves(self, policy: Policy) -> int:
        """Count waves, or rounds of all workers."""
        if policy == "retain":
            return ceil(sum(1 + count for count in self._frames) / self._num_workers)
        others = max(self._num_workers - 1, 1)
        return sum(max(ceil(count / others), 1) for count in self._frames)

    def bytes_on(self, workers: int, policy: Policy) -> int:
        """Count the keys and values that a node with so many workers holds at most."""
        if policy == "retain":
            return self.live_scenes * self._cache_bytes
        # Every wave that has a worker there may need all its steps there.
        return min(self._waves_at_once, workers) * self._window * self._step_bytes

    def choose(self) -> tuple[Policy, str]:
        """Give the policy and why. Raises ConfigError if it does not fit."""
        policy = self._config.policy
        if policy == "auto":
            chosen, why = self._choose()
        else:
            chosen, why = policy, f"cache.policy is {policy}"
        if chosen == "window":
            self._check_window()
        elif not self.live_scenes:
            raise ConfigError(self._no_room_to_retain())
        return chosen, why

    def _choose(self) -> tuple[Policy, str]:
        most, workers = max(self._frames), self._num_workers
        kept = f"{format_bytes(self._cache_bytes)} for a scene"
        if not self._cache_bytes:
            return "retain", "no keys and values are kept"
        if most + 1 > workers:
            return "retain", (
                f"a scene has {counted(most, 'frame video')}, and of {counted(workers, 'worker')} "
                f"only {workers - 1} can render them while one renders the identity video; so all "
                f"keys and values are kept, {kept}"
            )
        window, retain = self._window_rounds(), self.num_waves("retain")
        if self.live_scenes and window > _PATIENCE * retain:
            return "retain", (
                f"scenes in waves of up to {most + 1} videos would take {window} rounds of "
                f"{workers} workers, with all keys and values kept, {kept}, they take {retain}"
            )
        return "window", (
            f"{counted(most, 'frame video')} and their identity video fit in one wave of "
            f"{workers} workers; so {counted(self._window, 'step')} of keys and values are kept, "
            f"{format_bytes(self._window * self._step_bytes)}, instead of {kept}"
        )

    def _window_rounds(self) -> int:
        """Count how often the workers are filled with whole waves, in story order."""
        rounds, free = 0, 0
        for count in self._frames:
            if free < 1 + count:
                rounds, free = rounds + 1, self._num_workers
            free -= 1 + count
        return rounds

    def _room(self, node: NodeFacts) -> int:
        return int(node.store_bytes * STORE_SHARE)

    def _check_window(self) -> None:
        if self._num_workers < 2 and max(self._frames):
            raise ConfigError(
                "cache.policy: is window: needs at least 2 workers, one for the identity video and "
                "one for a frame video at the same time; the plan has 1. Set cache.policy=retain, "
                "or give the cluster more"
            )
        for node, workers in self._placed:
            needed = self.bytes_on(workers, "window")
            if needed > self._room(node):
                waves = min(self._waves_at_once, workers)
                raise ConfigError(
                    f"cache.window: is {self._window} steps of {format_bytes(self._step_bytes)}: "
                    f"for {counted(waves, 'scene')} at a time that is {format_bytes(needed)}, and "
                    f"{self._store_text(node)}. Set a smaller cache.window, or fewer "
                    f"cluster.workers, or start Ray there with {_store_option(needed)}"
                )

    def _no_room_to_retain(self) -> str:
        spill = self._config.spill_gb
        missing = self._cache_bytes - self._room(self._smallest)
        window = format_bytes(self._window * self._step_bytes)
        return (
            f"cache.policy: {'is' if self._config.policy == 'retain' else 'comes out as'} retain, "
            f"which keeps {format_bytes(self._cache_bytes)} of keys and values for a scene: "
            f"{self._store_text(self._smallest)}, and cache.spill_gb is {spill:g}. Set "
            f"cache.policy=window (keeps {window} and renders the identity video once for every "
            f"wave; needs 2 workers), or cache.spill_gb={ceil(missing / 10**9)} if the disk has "
            f"that, or start Ray there with {_store_option(self._cache_bytes)}"
        )

    def _store_text(self, node: NodeFacts) -> str:
        return (
            f"node {node.name} has room for {format_bytes(self._room(node))}, {STORE_SHARE:.0%} of "
            f"its object store of {format_bytes(node.store_bytes)}"
        )


def _store_option(needed: int) -> str:
    return f"--object-store-memory {ceil(needed / STORE_SHARE)}"


def _first(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_NODES_NAMED
    shown = ", ".join(texts[:_MOST_NODES_NAMED]) or "no nodes"
    return f"{shown} and {more} more" if more > 0 else shown
