"""What a cluster does with a story, and what it is refused for, with the numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from bachvid.catalog.registry import published_models
from bachvid.errors import ConfigError
from bachvid.planning.config import RenderConfig
from bachvid.planning.nodes import ClusterFacts, NodeFacts
from bachvid.planning.placement import (
    ExecutionPlan,
    ParallelDegree,
    parallel_degrees,
    plan_execution,
)
from bachvid.planning.plan import records_bytes
from bachvid.planning.resolve import build_method, resolve_config
from bachvid.units import format_bytes

FACTS = published_models()["THUDM/CogVideoX-5b"]
GB = 10**9
PAPER_BYTES = 17_550 * 48 * 64 * 2 * 2 * 15 * 26 * 2  # keys and values of one scene: 168.2 GB


def node(name: str = "a", *, cpus: int = 8, gpus: int = 0, store_gb: float = 1000) -> NodeFacts:
    return NodeFacts(
        id=f"id-{name}", name=name, cpus=cpus, gpus=gpus, store_bytes=int(store_gb * GB)
    )


def execute(
    nodes: Sequence[NodeFacts], *overrides: str, frames: Sequence[int] = (2,)
) -> ExecutionPlan:
    method = () if "method.name=none" in overrides else ("method.profile=paper",)
    config = RenderConfig.from_yaml(None, [*method, *overrides])
    resolved = resolve_config(config, FACTS)
    built = build_method(resolved)
    return plan_execution(
        ClusterFacts(tuple(nodes)),
        resolved,
        facts=FACTS,
        layout=FACTS.layout(resolved.video),
        method=built,
        frames=frames,
        cache_bytes=records_bytes(built.records, resolved, FACTS),
    )


def placed(plan: ExecutionPlan) -> dict[str, int]:
    return {node.name: node.workers for node in plan.nodes}


# As `ray.nodes()` of Ray 2.60 gave it, without the ports.
RAY_NODE = {
    "NodeID": "87fc4c608147c57b4890bd125e91c02908f3b7b334340d5e9981b9e9",
    "Alive": True,
    "NodeManagerHostname": "vm",
    "NodeName": "192.0.2.2",
    "Resources": {
        "node:192.0.2.2": 1.0,
        "object_store_memory": 104857600.0,
        "memory": 22607409152.0,
        "CPU": 2.0,
    },
}


def test_nodes_are_taken_as_ray_tells_them() -> None:
    gone = {**RAY_NODE, "Alive": False, "Resources": {}}
    head = {**RAY_NODE, "NodeID": "h", "Resources": {"GPU": 4.0}}
    assert ClusterFacts.from_ray([gone, RAY_NODE, head]).nodes == (
        NodeFacts(str(RAY_NODE["NodeID"]), "192.0.2.2", cpus=2, gpus=0, store_bytes=104857600),
        NodeFacts("h", "192.0.2.2", cpus=0, gpus=4, store_bytes=0),
    )


def test_the_node_with_most_room_is_filled_first() -> None:
    nodes = [node("small", cpus=2), node("head", cpus=0), node("big", cpus=4), node("mid", cpus=3)]
    assert placed(execute(nodes)) == {"big": 4, "mid": 3, "small": 2}
    assert placed(execute(nodes, "cluster.workers=5")) == {"big": 4, "mid": 1}
    assert placed(execute(nodes, "cluster.cpus_per_worker=2")) == {"big": 2, "mid": 1, "small": 1}


def test_of_equal_nodes_the_one_with_the_bigger_store_is_filled_first() -> None:
    plan = execute([node("a", store_gb=500), node("b"), node("c")], "cluster.workers=1")
    assert placed(plan) == {"b": 1}


def test_workers_take_gpus_where_there_are_any() -> None:
    nodes = [node("cpu", cpus=64), node("gpu", cpus=4, gpus=8)]
    plan = execute(nodes)
    assert (plan.device, plan.gpus_per_worker, placed(plan)) == ("cuda", 1, {"gpu": 4})
    plan = execute(nodes, "model.device=cpu")
    assert (plan.device, plan.gpus_per_worker, plan.num_workers) == ("cpu", 0, 68)
    plan = execute(nodes, "cluster.gpus_per_worker=0")
    assert (plan.device, plan.num_workers) == ("cpu", 68)
    assert execute(nodes[:1]).device == "cpu"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["cluster.workers=12"],
            "cluster.workers: asks for 12 workers, each with 1 CPU: the cluster has room for 11: "
            "a (8 CPUs, 0 GPUs, room for 8), b (3 CPUs, 0 GPUs, room for 3). Ask for fewer, for "
            "less each (cluster.cpus_per_worker, cluster.gpus_per_worker), or add nodes",
        ),
        (
            ["model.device=cuda"],
            "cluster.workers: asks for 1 worker, each with 1 CPU and 1 GPU: the cluster has room "
            "for 0: a (8 CPUs, 0 GPUs, room for 0), b (3 CPUs, 0 GPUs, room for 0). Ask for "
            "fewer, for less each (cluster.cpus_per_worker, cluster.gpus_per_worker), or add "
            "nodes",
        ),
        (
            ["model.device=cuda", "cluster.gpus_per_worker=0"],
            "cluster.gpus_per_worker: is 0, and model.device is cuda: on a cluster a worker sees "
            "the GPUs that it asks for and no other; change one of them",
        ),
        (
            ["model.device=cpu", "cluster.gpus_per_worker=1"],
            "cluster.gpus_per_worker: is 1, and model.device is cpu: on a cluster a worker sees "
            "the GPUs that it asks for and no other; change one of them",
        ),
        (
            ["cache.directory=kept"],
            "cache.directory: is 'kept': a cluster keeps keys and values in its object stores, not "
            "in files; leave it out, or render in one process",
        ),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        execute([node("a"), node("b", cpus=3)], *overrides)


def test_gangs_lie_on_one_node_each() -> None:
    nodes = [node("a", gpus=8), node("b", gpus=7), node("c", gpus=1)]
    plan = execute(nodes, "parallel.identity_gpus=2", "parallel.gpus_per_frame_actor=2")
    assert (placed(plan), plan.is_split) == ({"a": 4, "b": 3}, False)
    plan = execute(nodes, "parallel.identity_gpus=6")
    assert (placed(plan), plan.is_split) == ({"a": 3, "b": 7, "c": 1}, True)
    plan = execute(nodes, "parallel.identity_gpus=4", "parallel.gpus_per_frame_actor=3")
    assert placed(plan) == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["parallel.identity_gpus=5"],
            "parallel.identity_gpus: is 5: THUDM/CogVideoX-5b has 48 attention heads, which must "
            "divide by it; legal are 1, 2, 3, 4, 6, 8, 12, 16",
        ),
        (
            ["parallel.gpus_per_frame_actor=3", "parallel.cfg=2"],
            "parallel.gpus_per_frame_actor: is 3: THUDM/CogVideoX-5b has 48 attention heads, which "
            "must divide by it halved, since parallel.cfg is 2; legal are 2, 4, 6, 8, 12, 16",
        ),
        (
            ["parallel.cfg=2", "sampling.guidance_scale=1"],
            "parallel.cfg: is 2, and sampling.guidance_scale is 1: without guidance there is one "
            "branch only; set parallel.cfg=1",
        ),
        (
            ["parallel.identity_gpus=8", "parallel.gpus_per_frame_actor=8"],
            "cluster.workers: asks for 1 worker, each of 8 ranks on one node, each rank with 1 CPU "
            "and 1 GPU: the cluster has room for 0: a (8 CPUs, 6 GPUs, room for 0), b (3 CPUs, 0 "
            "GPUs, room for 0). Ask for fewer, for less each (cluster.cpus_per_worker, "
            "cluster.gpus_per_worker, parallel), or add nodes",
        ),
        (
            ["parallel.identity_gpus=6"],
            "cluster.workers: asks for 2 workers, one of 6 ranks for identity videos on one node "
            "and the others of 1, each rank with 1 CPU and 1 GPU: the cluster has room for 1: a (8 "
            "CPUs, 6 GPUs, room for 1), b (3 CPUs, 0 GPUs, room for 0). Ask for fewer, for less "
            "each (cluster.cpus_per_worker, cluster.gpus_per_worker, parallel), or add nodes",
        ),
    ],
)
def test_a_gang_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        execute([node("a", gpus=6), node("b", cpus=3)], *overrides)


def test_one_worker_renders_all_identity_videos_where_gangs_differ() -> None:
    nodes = [node("a", gpus=4), node("b", gpus=4)]
    plan = execute(nodes, "parallel.identity_gpus=2", "cache.policy=retain", frames=(6, 6, 6))
    assert plan.num_workers == 7
    assert plan.waves == 3  # 18 frame videos on 6 workers
    # One wave at a time, although two would fit: 4 steps of one scene.
    plan = execute(nodes, "parallel.identity_gpus=2", "cache.policy=window", frames=(2, 2))
    assert plan.waves == 2
    assert plan.nodes[0].cache_bytes == 4 * PAPER_BYTES // 26


def test_a_big_cluster_is_not_listed_whole() -> None:
    nodes = [node(f"n{i:02}", cpus=1) for i in range(20)]
    with pytest.raises(ConfigError, match=r"n07 \(1 CPU, 0 GPUs, room for 1\) and 12 more\. Ask"):
        execute(nodes, "cluster.workers=21")


def test_a_cluster_without_nodes_is_refused() -> None:
    with pytest.raises(ConfigError, match="has room for 0: no nodes"):
        execute([])


def test_window_is_chosen_when_every_scene_fits_in_one_wave() -> None:
    plan = execute([node(cpus=3)], frames=[2])
    assert (plan.policy, plan.waves) == ("window", 1)
    assert plan.why == (
        "2 frame videos and their identity video fit in one wave of 3 workers; so 4 steps of keys "
        "and values are kept, 25.9 GB, instead of 168.2 GB for a scene"
    )


def test_retain_is_chosen_when_a_scene_has_more_frame_videos_than_one_wave() -> None:
    plan = execute([node(cpus=3)], frames=[2, 3])
    assert (plan.policy, plan.waves) == ("retain", 3)  # 7 videos
    assert plan.why == (
        "a scene has 3 frame videos, and of 3 workers only 2 can render them while one renders the "
        "identity video; so all keys and values are kept, 168.2 GB for a scene"
    )


def test_retain_is_chosen_when_whole_waves_leave_workers_idle_for_long() -> None:
    plan = execute([node(cpus=8)], frames=[5] * 20)
    assert plan.policy == "retain"
    # An identity video of a wave: 6 steps to the mask, then 6 and 50; a frame video: 6 and 50.
    assert plan.why == (
        f"whole waves of up to 6 videos would keep 8 workers for {20 * 62} steps, one after "
        f"another; with all keys and values kept, 168.2 GB for a scene, it is {15 * 56}"
    )
    assert execute([node(cpus=8)], frames=[5]).policy == "window"  # nobody waits for the idle ones
    small = node(cpus=8, store_gb=100)  # holds no whole cache
    assert execute([small], frames=[5] * 20).policy == "window"
    # In this profile identity videos of waves take no longer, and here no worker is idle.
    fast = execute([node(cpus=12)], "method.profile=fast", frames=[5] * 20)
    assert fast.policy == "window"


def test_retain_is_chosen_where_only_it_fits() -> None:
    node_of_caches = node(cpus=12, store_gb=220)
    plan = execute([node_of_caches], "cache.window=20", frames=[2, 2])
    assert (plan.policy, plan.live_scenes) == ("retain", 1)
    assert plan.why == (
        "2 waves at a time of 20 steps each do not fit the object store; so all keys and values "
        "are kept, 168.2 GB for a scene"
    )
    with pytest.raises(ConfigError, match="comes out as retain"):
        execute([node(cpus=2, store_gb=0)], frames=[2])
    with pytest.raises(ConfigError, match=r"cache\.window: is 4 steps"):
        execute([node(cpus=3, store_gb=0)], frames=[2])


def test_the_config_may_choose() -> None:
    plan = execute([node(cpus=3)], "cache.policy=retain", frames=[2])
    assert (plan.policy, plan.why) == ("retain", "cache.policy is retain")
    plan = execute([node(cpus=3)], "cache.policy=window", frames=[5, 0])
    assert (plan.policy, plan.waves) == ("window", 4)  # 2 + 2 + 1 frame videos, and an identity


def test_without_a_method_nothing_is_kept() -> None:
    plan = execute([node(cpus=3, store_gb=0)], "method.name=none", frames=[2, 2])
    assert (plan.policy, plan.live_scenes, plan.nodes[0].cache_bytes) == ("retain", 2, 0)


@pytest.mark.parametrize(
    ("store_gb", "spill_gb", "live_scenes"),
    [(1000, 0, 4), (1100, 0, 5), (5000, 0, 9), (1000, 41, 4), (1000, 42, 5), (210.3, 0, 1)],
)
def test_as_many_scenes_are_live_as_caches_fit(
    store_gb: float, spill_gb: float, live_scenes: int
) -> None:
    # 80 % of the store and what may be spilled, in caches of 168.21 GB; there are 9 scenes
    nodes = [node("a", cpus=2, store_gb=9999), node("b", cpus=1, store_gb=store_gb)]
    overrides = ("cache.policy=retain", f"cache.spill_gb={spill_gb}")
    plan = execute(nodes, *overrides, frames=[5] * 9)
    assert plan.live_scenes == live_scenes
    expected = live_scenes * PAPER_BYTES
    assert [item.cache_bytes for item in plan.nodes] == [expected] * 2


def test_retain_that_does_not_fit_is_refused_with_the_ways_out() -> None:
    nodes = [node("a", cpus=2), node("b", cpus=2, store_gb=100)]
    with pytest.raises(ConfigError) as caught:
        execute(nodes, frames=[9])
    assert str(caught.value) == (
        "cache.policy: comes out as retain, which keeps 168.2 GB of keys and values for a scene: "
        "node b has room for 80.0 GB, 80% of its object store of 100.0 GB, and cache.spill_gb is "
        "0. Set cache.policy=window (keeps 25.9 GB and renders the identity video once for every "
        "wave; needs 2 workers), or cache.spill_gb=89 if the disk has that, or start Ray there "
        "with --object-store-memory 210263040000"
    )
    for way_out in ("cache.policy=window", "cache.spill_gb=89", "cluster.workers=2"):
        execute(nodes, way_out, frames=[9])
    bigger = [nodes[0], node("b", cpus=2, store_gb=210.26304)]
    assert execute(bigger, frames=[9]).live_scenes == 1


def test_a_window_needs_a_second_worker() -> None:
    with pytest.raises(ConfigError, match="is window: needs at least 2 workers"):
        execute([node(cpus=1)], "cache.policy=window")
    assert execute([node(cpus=1)], "cache.policy=auto").policy == "retain"
    execute([node(cpus=1)], "cache.policy=window", frames=[0])  # an identity video needs none


def test_a_window_is_counted_for_every_wave_that_a_node_takes_part_in() -> None:
    nodes = [node("a", cpus=6), node("b", cpus=1)]
    step = PAPER_BYTES // 26
    plan = execute(nodes, "cache.policy=window", frames=[2, 2, 2])  # two at a time
    assert [item.cache_bytes for item in plan.nodes] == [2 * 4 * step, 4 * step]
    plan = execute(nodes, "cache.policy=window", "cache.window=99", frames=[2])
    assert plan.nodes[0].cache_bytes == 26 * step  # there are no more


def test_a_window_that_does_not_fit_is_refused_with_the_ways_out() -> None:
    nodes = [node("a", cpus=6, store_gb=64)]
    with pytest.raises(ConfigError) as caught:
        execute(nodes, "cache.policy=window", frames=[2, 2])
    assert str(caught.value) == (
        "cache.window: is 4 steps of 6.5 GB: for 2 scenes at a time that is 51.8 GB, and node a "
        "has room for 51.2 GB, 80% of its object store of 64.0 GB. Set a smaller cache.window, or "
        "fewer cluster.workers, or start Ray there with --object-store-memory 64696320000"
    )
    for way_out in ("cache.window=3", "cluster.workers=5"):
        execute(nodes, "cache.policy=window", way_out, frames=[2, 2])
    bigger = node("a", cpus=6, store_gb=64.69632)
    execute([bigger], "cache.policy=window", frames=[2, 2])


def test_degrees_divide_the_heads_and_pad_the_tokens() -> None:
    assert parallel_degrees(48, 17_550) == tuple(
        ParallelDegree(ranks, padding)
        for ranks, padding in [
            (1, 0), (2, 0), (3, 0), (4, 2), (6, 0), (8, 2), (12, 6), (16, 2),
        ]
    )  # fmt: skip
    assert [degree.ranks for degree in parallel_degrees(30, 17_550)] == [1, 2, 3, 5, 6, 10, 15]
    assert execute([node()]).degrees == parallel_degrees(48, 17_550)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_500, "1.5 kB"), (PAPER_BYTES, "168.2 GB")],
)
def test_bytes_are_written_in_decimal_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_rounds_count_the_workers_for_whose_scenes_there_is_no_room() -> None:
    nodes = [node(name, cpus=8, store_gb=220) for name in "ab"]  # a cache each
    plan = execute(nodes, "cache.policy=retain", frames=[1] * 20)
    assert plan.waves == 10  # 2 scenes at a time; with room, 40 videos on 16 workers take 3
