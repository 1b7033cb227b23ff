"""Progress: one line for each stage, and a bar that ends full."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_inputs import GOOD_STORY
from json_models import write_json_model

from bachvid.cli.progress import BarProgress, LineProgress, stage_line
from bachvid.driver.events import Done, Event, Failed, FrameStep, IdentityStep, Published, Queued
from bachvid.inputs.story import Story
from bachvid.planning.config import RenderConfig
from bachvid.planning.plan import RenderPlan, render_plan

DONE = Done("coast", "jumps", Path("run/coast/jumps.mp4"), 1.25, (), False)


@pytest.fixture
def plan(tmp_path: Path) -> RenderPlan:
    path = tmp_path / "story.yaml"
    path.write_text(GOOD_STORY)
    model = write_json_model(tmp_path / "model", with_vocabulary=True)
    config = RenderConfig.from_yaml(None, [f"model.id={model}", "sampling.num_steps=5"])
    return render_plan(Story.load(path), config)


def events_of(plan: RenderPlan, todo: set[str]) -> list[Event]:
    """Return what the driver tells when only the videos of `todo` are missing."""
    (scene,) = plan.scenes
    steps, pre_pass = 5, plan.num_steps("jumps") - 5
    name = scene.scene.id
    found: list[Event] = [Queued(name, video.id) for video in scene.videos if video.id in todo]
    found += [IdentityStep(name, step, steps) for step in range(steps)]
    found.append(Published(name, 1_500))
    for video in scene.frames:
        if video.id in todo:
            found += [FrameStep(name, video.id, "pre_pass", i, pre_pass) for i in range(pre_pass)]
            found += [FrameStep(name, video.id, "main_run", i, steps) for i in range(steps)]
            found.append(DONE)
    return found


@pytest.mark.parametrize("todo", [{"identity", "stands-still", "jumps"}, {"jumps"}])
def test_the_bar_is_full_at_the_end(plan: RenderPlan, todo: set[str]) -> None:
    with BarProgress(plan) as progress:
        for event in events_of(plan, todo):
            progress.show(event)
        (task,) = progress.bar.tasks
    assert task.completed == task.total
    assert task.total == 5 + len(todo - {"identity"}) * plan.num_steps("jumps")


def test_lines_are_of_stages_and_not_of_steps(
    plan: RenderPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    with LineProgress() as progress:
        for event in events_of(plan, {"jumps"}):
            progress.show(event)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "coast: 1.5 kB of keys and values recorded",
        "coast/jumps: 1.2 s, run/coast/jumps.mp4",
    ]


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Failed("coast", "jumps", "no luck"), "coast/jumps: failed: no luck"),
        (
            Done("coast", "jumps", Path("a.mp4"), 2.0, ("mask was empty",), False),
            "coast/jumps: 2.0 s, a.mp4; mask was empty",
        ),
        (Done("coast", "jumps", Path("a.mp4"), 2.0, (), True), "coast/jumps: done before, a.mp4"),
        (Queued("coast", "jumps"), ""),
    ],
)
def test_a_stage_has_its_line(event: Event, line: str) -> None:
    assert stage_line(event) == line
