"""Rendering through Ray: the same latents as in one process, on any node, in either policy."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from clusters import wait_until
from ray.cluster_utils import Cluster

from bachvid.driver.renderer import (
    Done,
    Event,
    Failed,
    FrameStep,
    IdentityStep,
    Published,
    Started,
    StoryRenderer,
    WorkerPlaced,
)
from bachvid.errors import ConfigError, WorkerError
from bachvid.inputs.story import Story
from bachvid.output.journal import read_run
from bachvid.planning.config import RenderConfig
from bachvid.planning.plan import RenderPlan

STORY = Story.model_validate(
    {
        "title": "Two scenes",
        "seed": 1,
        "scenes": [
            {
                "id": "forest",
                "background": "a snowy forest",
                "character": "a girl with a yellow coat",
                "identity": "reads",
                "actions": ["jumps", "waves"],
            },
            {
                "id": "sea",
                "background": "the sea at night",
                "character": "a small robot",
                "actions": ["runs"],
            },
        ],
    }
)


def settings(folder: Path, *overrides: str) -> RenderConfig:
    return RenderConfig.from_yaml(
        None,
        [
            f"model.id={folder}",
            "model.threads=1",
            "sampling.num_steps=6",
            "method.profile=fast",
            "method.pre_passes=2",
            "method.mask_step=2",
            "method.inject_steps=[0, 5]",
            "output.min_height=32",
            *overrides,
        ],
    )


def render(folder: Path, out: Path, *overrides: str, address: str | None = None) -> list[Event]:
    with StoryRenderer(settings(folder, *overrides), out, address=address) as renderer:
        return list(renderer.stream(STORY))


def hashes(out: Path) -> dict[tuple[str, str], tuple[str, str]]:
    records = read_run(out).records
    return {key: (r.latents_sha256, r.frames_sha256) for key, r in records.items()}


@pytest.fixture(scope="module")
def expected(
    tiny_cogvideox_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[str, str]]:
    """The hashes of the same story, rendered in this process."""
    out = tmp_path_factory.mktemp("local") / "run"
    assert not [e for e in render(tiny_cogvideox_folder, out) if isinstance(e, Failed)]
    return hashes(out)


async def collect(renderer: StoryRenderer, plan: RenderPlan) -> list[Event]:
    return [event async for event in renderer.astream(plan)]


@pytest.mark.parametrize(("policy", "is_awaited"), [("window", False), ("retain", True)])
def test_three_nodes_give_the_latents_of_one_process(
    policy: str,
    is_awaited: bool,
    three_nodes: Cluster,
    tiny_cogvideox_folder: Path,
    expected: dict[tuple[str, str], tuple[str, str]],
    tmp_path: Path,
) -> None:
    config = settings(tiny_cogvideox_folder, f"cache.policy={policy}", "cache.window=2")
    with StoryRenderer(config, tmp_path / "run", address=three_nodes.address) as renderer:
        plan = renderer.plan(STORY)
        stream = asyncio.run(collect(renderer, plan)) if is_awaited else renderer.stream(plan)
        events = list(stream)
    assert hashes(tmp_path / "run") == expected
    # What a progress bar waits for is what comes: with a window an identity has more steps.
    steps = [event for event in events if isinstance(event, IdentityStep | FrameStep)]
    videos = [video.id for scene in plan.scenes for video in scene.videos]
    assert len(steps) == sum(map(plan.num_steps, videos))
    assert len([event for event in events if isinstance(event, Done)]) == 5
    placed = [e for e in events if isinstance(e, WorkerPlaced)]
    assert len({e.node for e in placed}) == 3
    started = [e for e in events if isinstance(e, Started)]
    assert {(e.scene, e.video) for e in started} == set(expected)
    assert {e.worker for e in started} <= {e.worker for e in placed}

    steps = [e for e in events if isinstance(e, IdentityStep) and e.scene == "forest"]
    # A window observes to step 2, then goes along with the second pre-pass and the main run.
    count = 3 + 3 + 6 if policy == "window" else 6
    assert [(e.step, e.num_steps) for e in steps] == [(i, count) for i in range(count)]
    jumps = [e for e in events if isinstance(e, FrameStep) and e.video == "jumps"]
    assert [(e.phase, e.step, e.num_steps) for e in jumps] == [
        *(("pre_pass", i, 6) for i in range(6)),
        *(("main_run", i, 6) for i in range(6)),
    ]
    assert {e.scene for e in events if isinstance(e, Published)} == {"forest", "sea"}


def test_nothing_is_left_on_the_cluster(
    three_nodes: Cluster, tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    config = settings(tiny_cogvideox_folder, "cluster.workers=1")
    with StoryRenderer(config, tmp_path, address=three_nodes.address) as renderer:
        for event in renderer.stream(STORY):
            if isinstance(event, IdentityStep):
                break
    assert not ray.is_initialized()
    ray.init(address=three_nodes.address, log_to_driver=False)
    try:
        groups = ray.util.placement_group_table().values()
        assert {group["state"] for group in groups} <= {"REMOVED"}
        assert wait_until(lambda: ray.available_resources()["CPU"] == 3, seconds=30)
    finally:
        ray.shutdown()


def test_a_finished_story_starts_no_worker(
    three_nodes: Cluster, tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    render(tiny_cogvideox_folder, tmp_path)
    events = render(tiny_cogvideox_folder, tmp_path, address=three_nodes.address)
    assert [(e.is_resumed, type(e)) for e in events] == [(True, Done)] * 5  # type: ignore[union-attr]


def test_a_request_that_nothing_can_fulfil_fails_within_seconds(
    three_nodes: Cluster, tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="cpus_per_worker"):
        render(
            tiny_cogvideox_folder,
            tmp_path / "wide",
            "cluster.cpus_per_worker=2",
            address=three_nodes.address,
        )
    assert not (tmp_path / "wide").exists()

    ray.init(address=three_nodes.address, log_to_driver=False)
    hold = ray.util.placement_group([{"CPU": 1}] * 3)
    assert hold.wait(10)
    try:
        with pytest.raises(WorkerError, match="no worker found a place in 2 s"):
            render(
                tiny_cogvideox_folder,
                tmp_path / "busy",
                "cluster.wait_seconds=2",
                address=three_nodes.address,
            )
        assert ray.is_initialized()  # who connected before stays connected
    finally:
        ray.util.remove_placement_group(hold)
        ray.shutdown()


def test_damaged_weights_are_told_in_our_words(
    three_nodes: Cluster, tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_cogvideox_folder, tmp_path / "model"))
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"^model.id .* cannot load its transformer"):
        render(folder, tmp_path / "run", "cluster.workers=1", address=three_nodes.address)


def test_a_video_that_cannot_be_rendered_fails_alone(
    three_nodes: Cluster, tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    """Masks of random weights are sometimes empty: with `fail` their videos fail, in words.

    An identity fails its frame videos, unless one of these failed before that was heard of.
    """
    fail = ("method.on_empty_mask=fail", "method.mask_layers=[0]", "method.morphology=true")
    there = (tmp_path / "there", *fail, "cluster.workers=2")
    events = render(tiny_cogvideox_folder, *there, address=three_nodes.address)
    local = render(tiny_cogvideox_folder, tmp_path / "here", *fail)

    def failures(all_events: list[Event]) -> set[tuple[str, str, str]]:
        failed = [event for event in all_events if isinstance(event, Failed)]
        return {(e.scene, e.video, e.error.partition(" failed ")[2]) for e in failed}

    assert {scene for scene, _, _ in failures(events)} == {"sea"}
    assert failures(events) == failures(local)


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_render_on_ray import STORY, settings
from bachvid.driver.renderer import StoryRenderer

_, tests, model, out, address = sys.argv
config = settings(Path(model), "method.profile=paper", "method.pre_passes=1")
with StoryRenderer(config, Path(out), address=address) as renderer:
    events = list(renderer.stream(STORY))
print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""


def test_a_driver_without_torch_renders_the_paper_profile(
    three_nodes: Cluster, tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    """Its pre-pass reads too; and no result brings torch into the driver's process."""
    arguments = [str(Path(__file__).parent), str(tiny_cogvideox_folder), str(tmp_path / "run")]
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments, three_nodes.address],
        check=True,
        capture_output=True,
        text=True,
    )
    assert driver.stdout.splitlines()[-1] == "[]"
    paper = ("method.profile=paper", "method.pre_passes=1")
    render(tiny_cogvideox_folder, tmp_path / "here", *paper)
    assert hashes(tmp_path / "run") == hashes(tmp_path / "here")
