"""What a cluster has, and what a render does with it: workers, waves, bytes on every node.

Pure: no torch and no Ray. `bachvid.ray_cluster` asks a cluster; `plan_execution` is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bachvid.cache_policy import CacheRoom, counted
from bachvid.config import ClusterConfig, RenderConfig
from bachvid.errors import ConfigError
from bachvid.facts import ModelFacts
from bachvid.schedule import Policy
from bachvid.tokens import TokenLayout

Device = Literal["cpu", "cuda"]
MAX_DEGREE = 16  # of sequence parallelism: GPUs that one machine may have
_MOST_NODES_NAMED = 8


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
    if config.cache.directory is not None:
        raise ConfigError(
            f"cache.directory: is {config.cache.directory!r}: a cluster keeps keys and values in "
            f"its object stores, not in files; leave it out, or render in one process"
        )
    gpus = _gpus_per_worker(cluster, config)
    placed = _place_workers(cluster, config.cluster, gpus)
    caches = CacheRoom(config, placed, frames, cache_bytes, num_steps)
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


def _first(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_NODES_NAMED
    shown = ", ".join(texts[:_MOST_NODES_NAMED]) or "no nodes"
    return f"{shown} and {more} more" if more > 0 else shown
