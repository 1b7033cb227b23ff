"""How close the schedule comes to what no schedule can beat, from 1 to 1,024 workers.

    python benchmarks/schedule.py

Simulates rendering with the real Schedule and the policy of the real plan, but no model: a video
takes the time of its steps. The bound is the larger of all work, every identity video rendered
once, shared out evenly, and one scene on as many workers as it has videos; it knows no memory.
The default times are those of the storybook model on one CPU core, from a run's journal; the
memory is that of CogVideoX-5b.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import click

from bachvid.catalog.registry import published_models
from bachvid.inputs.choices import Policy
from bachvid.inputs.story import IDENTITY_ID
from bachvid.methods.base import Method
from bachvid.methods.reading import ReadingOrder
from bachvid.planning.config import RenderConfig
from bachvid.planning.nodes import ClusterFacts, NodeFacts
from bachvid.planning.placement import plan_execution
from bachvid.planning.plan import records_bytes
from bachvid.planning.resolve import build_method, resolve_config
from bachvid.scheduling.schedule import SceneWork, Schedule, Slot

MODEL = published_models()["THUDM/CogVideoX-5b"]
NUM_ACTIONS = 10_000
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Durations:
    """Seconds of a step, and of the videos, if they wait for nothing.

    In a wave the identity video is rendered again for every run of the frame videos that reads.
    """

    step: float
    identity: float
    wave_identity: float
    frame: float

    def of(self, video: str, policy: Policy) -> float:
        """Seconds that a worker is busy with a video."""
        if video != IDENTITY_ID:
            return self.frame
        return self.identity if policy == "retain" else self.wave_identity


@dataclass(frozen=True)
class Result:
    """Seconds from start to end, and what none could be faster than."""

    makespan: float
    bound: float


def simulate(
    scenes: Sequence[SceneWork],
    durations: Durations,
    *,
    policy: Policy,
    live_scenes: int,
    num_workers: int,
) -> Result:
    """Render all scenes in simulated time."""
    schedule = Schedule(scenes, policy=policy, live_scenes=live_scenes)
    idle = [Slot(worker, f"node{worker // GPUS_PER_NODE}") for worker in range(num_workers)]
    nodes = {slot.worker: slot.node for slot in idle}
    identity_ends: dict[str, float] = {}
    ends: list[tuple[float, int, str, str]] = []
    now = 0.0
    while True:
        for one in schedule.assign(idle, num_workers):
            end = now + durations.of(one.video, policy)
            if one.video == IDENTITY_ID:
                identity_ends[one.scene] = end
            else:  # its last step reads what the identity video's last step left
                end = max(end, identity_ends[one.scene] + durations.step)
            heappush(ends, (end, one.worker, one.scene, one.video))
        if not ends:
            break
        busy = {worker for _, worker, _, _ in ends}
        now = ends[0][0]
        idle = [slot for slot in idle if slot.worker not in busy]
        while ends and ends[0][0] == now:
            _, worker, scene, video = heappop(ends)
            schedule.done(scene, video)
            idle.append(Slot(worker, nodes[worker]))
    assert schedule.is_over
    return Result(now, bound(scenes, durations, num_workers))


def bound(scenes: Sequence[SceneWork], durations: Durations, num_workers: int) -> float:
    """Return seconds that no schedule can beat: every identity video is rendered once."""
    videos = sum(len(scene.frames) for scene in scenes)
    work = len(scenes) * durations.identity + videos * durations.frame
    if not videos:
        longest = durations.identity
    elif num_workers == 1:
        longest = durations.identity + durations.frame
    else:
        longest = max(durations.frame, durations.identity + durations.step)
    return max(work / num_workers, longest)


def even_scenes() -> list[SceneWork]:
    """Return 2,000 scenes of 5 actions."""
    return [scene(i, 5) for i in range(NUM_ACTIONS // 5)]


def uneven_scenes() -> list[SceneWork]:
    """Return scenes of 1 to 400 actions, most of them short, 10,000 actions in all."""
    rng = random.Random(0)
    counts: list[int] = []
    while sum(counts) < NUM_ACTIONS:
        counts.append(min(int(rng.paretovariate(0.9)), 400, NUM_ACTIONS - sum(counts)))
    return [scene(i, count) for i, count in enumerate(counts)]


def scene(number: int, num_frames: int) -> SceneWork:
    """Return a scene with as many frame videos."""
    return SceneWork(f"s{number}", tuple(f"f{i}" for i in range(num_frames)))


def measured(method: Method[Any], step: float, injected: float, decode: float) -> Durations:
    """Return the time of the videos of a method."""
    frame = method.runs("frame")
    reads = sum(len(run.reads) for run in frame)
    plain = sum(len(run.steps) for run in frame) - reads
    alone, in_wave = (
        sum(len(run.steps) for run in ReadingOrder(method, is_window=is_window).identity_runs)
        for is_window in (False, True)
    )
    return Durations(
        step=injected,  # of a frame video, after the last of its identity video
        identity=alone * step + decode,
        wave_identity=in_wave * step + decode,
        frame=plain * step + reads * injected + decode,
    )


@click.command()
@click.option("--profile", type=click.Choice(["paper", "fast"]), default="fast")
@click.option("--step", default=0.078, help="Seconds of a plain step.")
@click.option("--injected", default=0.078, help="Seconds of a step that injects.")
@click.option("--decode", default=0.45, help="Seconds to decode and write a video.")
@click.option("--store", default=1000.0, help="GB of object store of a node of 8 workers.")
def main(profile: str, step: float, injected: float, decode: float, store: float) -> None:
    """Print makespan / bound for both stories and every number of workers."""
    config = resolve_config(RenderConfig.from_yaml(None, [f"method.profile={profile}"]), MODEL)
    method = build_method(config)
    durations = measured(method, step, injected, decode)
    click.echo(
        f"identity video {durations.identity:.1f} s, in a wave {durations.wave_identity:.1f} s, "
        f"frame video {durations.frame:.1f} s; nodes of {GPUS_PER_NODE} workers with {store:g} GB\n"
    )
    click.echo("| story | workers | policy | caches per node | minutes | / bound | simulated in |")
    click.echo("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    worst = 0.0
    for name, scenes in (("even", even_scenes()), ("uneven", uneven_scenes())):
        for num_workers in (2**power for power in range(11)):
            plan = plan_execution(
                ClusterFacts(tuple(nodes(num_workers, store))),
                config,
                facts=MODEL,
                layout=MODEL.layout(config.video),
                frames=[len(scene.frames) for scene in scenes],
                method=method,
                cache_bytes=records_bytes(method.records, config, MODEL),
            )
            start = time.perf_counter()
            result = simulate(
                scenes,
                durations,
                policy=plan.policy,
                live_scenes=plan.live_scenes,
                num_workers=num_workers,
            )
            worst = max(worst, result.makespan / result.bound)
            click.echo(
                f"| {name}, {len(scenes):,} scenes | {num_workers:,} | {plan.policy} | "
                f"{plan.live_scenes} | {result.makespan / 60:.1f} | "
                f"{result.makespan / result.bound:.3f} | {time.perf_counter() - start:.1f} s |"
            )
    click.echo(f"\nworst {worst:.3f}, target 1.10")


def nodes(num_workers: int, store: float) -> list[NodeFacts]:
    """Return nodes with a GPU for every worker."""
    counts = [min(GPUS_PER_NODE, num_workers - i) for i in range(0, num_workers, GPUS_PER_NODE)]
    return [
        NodeFacts(f"node{i}", f"node{i}", cpus=count, gpus=count, store_bytes=int(store * 1e9))
        for i, count in enumerate(counts)
    ]


if __name__ == "__main__":
    main()
