"""The machines of a cluster, and what each of them has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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
        """Build from the output of `ray.nodes()`."""
        return cls(tuple(_node_from_ray(node) for node in nodes if node["Alive"]))


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
