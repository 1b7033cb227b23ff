"""Plans a render on a cluster: workers, waves, and the bytes on every node.

Pure: no torch and no Ray; the machines of the cluster are an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bachvid.catalog.facts import ModelFacts
from bachvid.errors import ConfigError
from bachvid.inputs.choices import Policy
from bachvid.inputs.sections import ClusterConfig
from bachvid.layout.gangs import Gang
from bachvid.layout.tokens import TokenLayout
from bachvid.methods.base import Method
from bachvid.planning.cache_room import CacheRoom
from bachvid.planning.config import ResolvedConfig
from bachvid.planning.nodes import ClusterFacts, NodeFacts
from bachvid.units import pluralize

Device = Literal["cpu", "cuda"]
MAX_DEGREE = 16  # of sequence parallelism: GPUs that one machine may have
_MOST_NODES_NAMED = 8


@dataclass(frozen=True, slots=True)
class NodePlan:
    """The share of a render on one node. At most `cache_bytes` of pieces are kept there."""

    id: str
    name: str
    workers: int
    cache_bytes: int
    store_bytes: int


@dataclass(frozen=True, slots=True)
class ParallelDegree:
    """A number of GPUs that can share one video, with `padding` tokens to divide evenly."""

    ranks: int
    padding: int


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """How a cluster renders a story.

    A worker is a gang of ranks on one node. If all gangs have one size, each renders identity and
    frame videos. With two sizes, one gang renders all identity videos and nothing else: the size
    of the gang decides the last bits of a video, so it must not depend on chance.

    nodes: those with workers; the first one renders the first identity video.
    identity, frame: the gangs of an identity and of a frame video.
    cpus_per_worker, gpus_per_worker: of every rank.
    waves: under `window`, of the whole story; under `retain`, rounds in which every worker
        renders one video.
    live_scenes: under `retain`, identity caches that one node has room for.
    degrees: of sequence parallelism, legal for model and size.
    """

    nodes: tuple[NodePlan, ...]
    identity: Gang
    frame: Gang
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

    @property
    def is_split(self) -> bool:
        """Whether one worker renders all identity videos, and nothing else."""
        return self.identity != self.frame


def plan_execution(
    cluster: ClusterFacts,
    config: ResolvedConfig,
    *,
    facts: ModelFacts,
    layout: TokenLayout,
    method: Method[Any],
    frames: Sequence[int],
    cache_bytes: int,
) -> ExecutionPlan:
    """Decide where workers run, and how long keys and values of the identity videos are kept.

    Args:
        frames: frame videos of every scene.
        cache_bytes: keys and values of one scene.

    Raises:
        ConfigError: if the cluster has too little for what the config asks for.
    """
    if config.cache.directory is not None:
        raise ConfigError(
            f"cache.directory: is {config.cache.directory!r}: a cluster keeps keys and values in "
            f"its object stores, not in files; leave it out, or render in one process"
        )
    gpus = _gpus_per_worker(cluster, config)
    identity, frame = plan_gangs(config, facts)
    placed = _place_workers(cluster, config.cluster, gpus, identity, frame)
    caches = CacheRoom(
        config.cache, method, placed, frames, cache_bytes, is_split=identity != frame
    )
    policy, why = caches.choose()
    return ExecutionPlan(
        nodes=tuple(
            NodePlan(n.id, n.name, workers, caches.bytes_on(workers, policy), n.store_bytes)
            for n, workers in placed
        ),
        identity=identity,
        frame=frame,
        device="cuda" if gpus else "cpu",
        cpus_per_worker=config.cluster.cpus_per_worker,
        gpus_per_worker=gpus,
        policy=policy,
        why=why,
        waves=caches.num_waves(policy),
        live_scenes=caches.live_scenes,
        degrees=parallel_degrees(facts.num_heads, layout.video_tokens),
    )


def plan_gangs(config: ResolvedConfig, facts: ModelFacts) -> tuple[Gang, Gang]:
    """Return the gangs of identity and frame videos. Raises ConfigError for illegal sizes."""
    asked = config.parallel
    if asked.cfg == 2 and config.sampling.guidance_scale == 1:
        raise ConfigError(
            "parallel.cfg: is 2, and sampling.guidance_scale is 1: without guidance there is one "
            "branch only; set parallel.cfg=1"
        )
    gangs = []
    for key in ("identity_gpus", "gpus_per_frame_actor"):
        size: int = getattr(asked, key)
        cfg = asked.cfg if size > 1 else 1  # a single GPU runs both branches anyway
        legal = [n * cfg for n in range(1, MAX_DEGREE // cfg + 1) if facts.num_heads % n == 0]
        if size not in legal:
            raise ConfigError(
                f"parallel.{key}: is {size}: {facts.name} has {facts.num_heads} attention heads, "
                f"which must divide by it{' halved, since parallel.cfg is 2' * (cfg - 1)}; legal "
                f"are {', '.join(map(str, legal))}"
            )
        gangs.append(Gang(size, cfg))
    return gangs[0], gangs[1]


def parallel_degrees(num_heads: int, video_tokens: int) -> tuple[ParallelDegree, ...]:
    """Return the numbers of GPUs that can share a video: those that divide the attention heads.

    Tokens need not divide: they are padded at the end, and no pad is ever a key.
    """
    ranks = [n for n in range(1, min(num_heads, MAX_DEGREE) + 1) if num_heads % n == 0]
    return tuple(ParallelDegree(n, -video_tokens % n) for n in ranks)


def _gpus_per_worker(cluster: ClusterFacts, config: ResolvedConfig) -> int:
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
    cluster: ClusterFacts, asked: ClusterConfig, gpus: int, identity: Gang, frame: Gang
) -> list[tuple[NodeFacts, int]]:
    """Fill the node that has most, for the identity video and its readers, then the others."""

    def ranks(node: NodeFacts) -> int:
        return min(node.cpus // asked.cpus_per_worker, node.gpus if gpus else node.cpus)

    nodes = sorted(cluster.nodes, key=lambda n: (-ranks(n), -n.store_bytes, n.name, n.id))
    rooms = {node.id: ranks(node) // frame.size for node in nodes}
    if nodes and identity != frame:
        left = ranks(nodes[0]) - identity.size
        rooms[nodes[0].id] = 1 + left // frame.size if left >= 0 else 0
    total = sum(rooms.values()) if not nodes or rooms[nodes[0].id] else 0
    wanted = total if asked.workers is None else asked.workers
    # With two kinds of worker, at least one of each.
    if not 0 < wanted <= total or (wanted == 1 and identity != frame):
        has = [
            f"{node.name} ({pluralize(node.cpus, 'CPU')}, {pluralize(node.gpus, 'GPU')}, room for "
            f"{rooms[node.id]})"
            for node in nodes
        ]
        raise ConfigError(
            f"cluster.workers: asks for {_asked_text(wanted, asked, gpus, identity, frame)}: the "
            f"cluster has room for {total}: {_first(has)}. Ask for fewer, for less each "
            f"(cluster.cpus_per_worker, cluster.gpus_per_worker"
            f"{', parallel' * (max(identity.size, frame.size) > 1)}), or add nodes"
        )
    placed = []
    for node in nodes:
        workers = min(rooms[node.id], wanted)
        wanted -= workers
        if workers:
            placed.append((node, workers))
    return placed


def _asked_text(wanted: int, asked: ClusterConfig, gpus: int, identity: Gang, frame: Gang) -> str:
    each = pluralize(asked.cpus_per_worker, "CPU") + " and 1 GPU" * gpus
    if identity != frame:
        return (
            f"{pluralize(max(wanted, 2), 'worker')}, one of {pluralize(identity.size, 'rank')} for "
            f"identity videos on one node and the others of {frame.size}, each rank with {each}"
        )
    if frame.size > 1:
        return (
            f"{pluralize(max(wanted, 1), 'worker')}, each of {frame.size} ranks on one node, each "
            f"rank with {each}"
        )
    return f"{pluralize(max(wanted, 1), 'worker')}, each with {each}"


def _first(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_NODES_NAMED
    shown = ", ".join(texts[:_MOST_NODES_NAMED]) or "no nodes"
    return f"{shown} and {more} more" if more > 0 else shown
