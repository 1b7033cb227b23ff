"""The writer: what is handed in reaches the disk, in its order, while the loop goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_driver import STORY, settings

from bachvid.driver.events import Done, Failed, FrameStep, Preview
from bachvid.driver.writer import Writer
from bachvid.engine.results import Frames, RenderedVideo
from bachvid.errors import LayoutError
from bachvid.output.files import IdentityPicture, contact_sheet, run_header, wanted_files
from bachvid.output.run_directory import RunDirectory
from bachvid.planning.plan import RenderPlan, render_plan
from bachvid.scheduling.pool import Finished, Job

STEP = FrameStep("forest", "jumps", "main_run", 0, 2)


@pytest.fixture(scope="module")
def plan(tiny_cogvideox_folder: Path) -> RenderPlan:
    return render_plan(STORY, settings(tiny_cogvideox_folder))


@pytest.fixture
def run(plan: RenderPlan, tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory(tmp_path / "run", run_header(plan)) as opened:
        yield opened


@pytest.fixture
def writer(plan: RenderPlan, run: RunDirectory) -> Iterator[Writer]:
    opened = Writer(plan, run)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def noise() -> Frames:
    """Frames that take H.264 a second."""
    return np.random.default_rng(0).integers(0, 255, (25, 240, 360, 3), dtype=np.uint8)


def hand_in(writer: Writer, run: RunDirectory, job: Job, plan: RenderPlan, frames: Frames) -> None:
    foreground = np.ones((13, 4, 6), dtype=np.bool_)
    rendered = RenderedVideo(
        frames=frames,
        latents=np.zeros((1,), dtype=np.float32),
        foreground=foreground,
        matched=None,
        latents_sha256="0",
        frames_sha256="1",
        seconds={"main_run": 1.5},
        recoveries=("a mask was empty",),
    )
    scene, video = job.scene.scene.id, job.video.id
    files = wanted_files(run, plan, scene=scene, video=video)
    writer.video(
        Finished(job, rendered, {"device": "cpu"}, waited=0.25),
        {"mp4": files["mp4"]},
        IdentityPicture(frames, foreground),
    )


def jobs_of(plan: RenderPlan) -> list[Job]:
    return [Job(scene, video) for scene in plan.scenes for video in scene.videos]


def test_a_video_is_told_of_when_it_is_on_the_disk_and_in_the_journal(
    plan: RenderPlan, run: RunDirectory, writer: Writer, noise: Frames
) -> None:
    hand_in(writer, run, jobs_of(plan)[0], plan, noise)
    assert list(writer.written()) == []
    assert run.record("forest", "identity") is None
    (done,) = writer.finish()
    path = run.path / "forest" / "identity.mp4"
    assert isinstance(done, Done)
    assert (done.path, done.waited, done.recoveries) == (path, 0.25, ("a mask was empty",))
    assert done.seconds > 1.5  # and those of writing
    assert not run.missing("forest", "identity", [path])


def test_few_videos_wait_in_memory(
    plan: RenderPlan, run: RunDirectory, writer: Writer, noise: Frames
) -> None:
    jobs = jobs_of(plan)
    for job in [*jobs, jobs[0]]:
        hand_in(writer, run, job, plan, noise)
    assert len(run.contents.records) >= 2  # of six


def test_the_events_of_a_video_keep_their_order(
    plan: RenderPlan, writer: Writer, noise: Frames
) -> None:
    _, jumps, waves, *_ = jobs_of(plan)
    assert not writer.hold(jumps, STEP)
    writer.preview(jumps, noise)
    assert writer.hold(jumps, STEP)
    assert not writer.hold(waves, STEP)
    writer.failure(jumps, "no luck")
    assert [type(event) for event in writer.finish()] == [Preview, FrameStep, Failed]
    assert not writer.hold(jumps, STEP)


def test_closing_writes_what_was_handed_in(
    plan: RenderPlan, run: RunDirectory, writer: Writer, noise: Frames
) -> None:
    job = jobs_of(plan)[0]
    hand_in(writer, run, job, plan, noise)
    writer.end_scene(job.scene)
    writer.close()
    assert run.record("forest", "identity") is not None
    assert contact_sheet(run, job.scene).exists()


def test_what_a_write_raises_comes_in_its_place(
    plan: RenderPlan, run: RunDirectory, writer: Writer, noise: Frames
) -> None:
    first, second, third, *_ = jobs_of(plan)
    hand_in(writer, run, first, plan, noise)
    hand_in(writer, run, second, plan, noise[:, :239])  # no multiple of the tokens
    hand_in(writer, run, third, plan, noise)
    told = writer.finish()
    assert isinstance(next(told), Done)
    with pytest.raises(LayoutError):
        next(told)
    writer.close()
    assert set(run.contents.records) == {("forest", "identity"), ("forest", "waves")}
