"""StoryRenderer on a tiny model: what is rendered, kept, refused and continued."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bachvid.driver.renderer import (
    Done,
    Event,
    Failed,
    FrameStep,
    IdentityStep,
    Preview,
    Published,
    StoryRenderer,
)
from bachvid.engine.sampling import denoise
from bachvid.engine.worker import ModelWorker, array_sha256
from bachvid.errors import ConfigError, WorkerError
from bachvid.inputs.story import Story
from bachvid.methods.base import Run
from bachvid.output.journal import read_run
from bachvid.planning.config import RenderConfig
from bachvid.planning.plan import render_plan
from bachvid.prompts.compose import Prompt

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
VIDEOS = {
    ("forest", "identity"),
    ("forest", "jumps"),
    ("forest", "waves"),
    ("sea", "identity"),
    ("sea", "runs"),
}


def settings(folder: Path, *overrides: str) -> RenderConfig:
    bachvid = ["method.profile=paper", "method.inject_steps=[0, 2]"]
    return RenderConfig.from_yaml(
        None,
        [
            f"model.id={folder}",
            "model.threads=1",
            "sampling.num_steps=2",
            *([] if "method.name=none" in overrides else bachvid),
            "method.mask_step=1",
            "output.min_height=32",
            *overrides,
        ],
    )


def render(folder: Path, out: Path, *overrides: str) -> list[Event]:
    with StoryRenderer(settings(folder, *overrides), out) as renderer:
        return list(renderer.stream(STORY))


def hashes(out: Path) -> dict[tuple[str, str], tuple[str, str]]:
    records = read_run(out).records
    return {key: (r.latents_sha256, r.frames_sha256) for key, r in records.items()}


def kinds(events: Sequence[Event], kind: type[Done | Failed | FrameStep]) -> list[tuple[str, str]]:
    return [(event.scene, event.video) for event in events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def finished(
    tiny_cogvideox_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Event]]:
    """A finished run, not to be changed, and the events of rendering it."""
    out = tmp_path_factory.mktemp("driver") / "run"
    return out, render(tiny_cogvideox_folder, out)


@pytest.fixture
def run(finished: tuple[Path, list[Event]], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_every_video_is_rendered_and_told_of(finished: tuple[Path, list[Event]]) -> None:
    out, events = finished
    assert set(kinds(events, Done)) == VIDEOS
    assert not kinds(events, Failed)
    forest = [event for event in events if getattr(event, "scene", None) == "forest"]
    assert [e.step for e in forest if isinstance(e, IdentityStep)] == [0, 1]
    jumps = [e for e in forest if isinstance(e, FrameStep) and e.video == "jumps"]
    assert [(e.phase, e.step, e.num_steps) for e in jumps] == [
        ("pre_pass", 0, 2),
        ("pre_pass", 1, 2),
        ("main_run", 0, 2),
        ("main_run", 1, 2),
    ]
    published = [e for e in events if isinstance(e, Published)]
    # 72 tokens, 2 x 16 channels, fp32, keys and values, 3 layers, 2 branches, 2 steps.
    assert [e.cache_bytes for e in published] == [72 * 32 * 4 * 2 * 3 * 2 * 2] * 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert {(v["scene"], v["video"]) for v in manifest["videos"]} == VIDEOS
    assert manifest["videos"][0]["provenance"]["device"] == "cpu"


def test_every_file_of_a_run_is_there(finished: tuple[Path, list[Event]]) -> None:
    out, _ = finished
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {
        ".lock",
        "journal.jsonl",
        "manifest.json",
        *(f"{scene}/contact-sheet.png" for scene in ("forest", "sea")),
        *(f"{scene}/{video}.mp4" for scene, video in VIDEOS),
        *(f"{scene}/masks/{video}.npz" for scene, video in VIDEOS),
        *(f"{scene}/overlays/{video}.mask.png" for scene, video in VIDEOS),
        *(f"{s}/overlays/{v}.match.png" for s, v in VIDEOS if v != "identity"),
    }


def test_a_finished_run_is_left_alone_and_needs_no_model(
    run: Path, tiny_cogvideox_folder: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.*") if path.suffix != ".json"}
    events = render(tiny_cogvideox_folder, run)
    assert [type(event) for event in events] == [Done] * 5
    assert all(event.is_resumed for event in events if isinstance(event, Done))
    assert {path: path.stat().st_mtime_ns for path in before if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }


def test_only_a_lost_file_is_written_again(run: Path, tiny_cogvideox_folder: Path) -> None:
    expected, kept = hashes(run), (run / "forest" / "overlays" / "waves.mask.png")
    (run / "forest" / "waves.mp4").unlink()
    before = kept.stat().st_mtime_ns
    events = render(tiny_cogvideox_folder, run)
    assert [e.video for e in events if isinstance(e, Done) and not e.is_resumed] == ["waves"]
    assert {e.video for e in events if isinstance(e, FrameStep)} == {"waves"}
    assert hashes(run) == expected
    assert kept.stat().st_mtime_ns == before
    assert (run / "forest" / "waves.mp4").exists()


def test_frames_can_be_added_to_a_finished_run(run: Path, tiny_cogvideox_folder: Path) -> None:
    expected = hashes(run)
    before = (run / "sea" / "runs.mp4").stat().st_mtime_ns
    render(tiny_cogvideox_folder, run, "output.frames=true")
    assert hashes(run) == expected
    assert (run / "sea" / "runs.mp4").stat().st_mtime_ns == before
    for (scene, video), (_, digest) in expected.items():
        with np.load(run / scene / "frames" / f"{video}.npz") as arrays:
            assert arrays["frames"].shape == (5, 32, 48, 3)
            assert arrays["foreground"].shape == (5, 32, 48)
            assert arrays["foreground"].dtype == np.bool_
            assert array_sha256(arrays["frames"]) == digest
        with np.load(run / scene / "masks" / f"{video}.npz") as arrays:
            assert arrays["foreground"].shape == (3, 4, 6)


def test_a_failed_video_does_not_fail_its_siblings(run: Path, tiny_cogvideox_folder: Path) -> None:
    """`jumps` comes out different from its journal, which is a failure like any other."""
    journal = run / "journal.jsonl"
    real = read_run(run).records["forest", "jumps"].latents_sha256
    journal.write_text(journal.read_text().replace(real, "0" * 64))
    for video in ("jumps", "waves"):
        (run / "forest" / f"{video}.mp4").unlink()
    events = render(tiny_cogvideox_folder, run)
    assert kinds(events, Failed) == [("forest", "jumps")]
    failed = next(event for event in events if isinstance(event, Failed))
    assert "forest/jumps does not come out as it did before" in failed.error
    assert [e.video for e in events if isinstance(e, Done) and not e.is_resumed] == ["waves"]
    assert set(read_run(run).failures) == {("forest", "jumps")}


def test_a_failed_identity_fails_only_its_scene(run: Path, tiny_cogvideox_folder: Path) -> None:
    journal = run / "journal.jsonl"
    real = read_run(run).records["forest", "identity"].latents_sha256
    journal.write_text(journal.read_text().replace(real, "0" * 64))
    for path in (run / "forest" / "jumps.mp4", run / "sea" / "runs.mp4"):
        path.unlink()
    events = render(tiny_cogvideox_folder, run)
    assert kinds(events, Failed) == [("forest", "jumps")]
    assert ("sea", "runs") in kinds(events, Done)


@pytest.mark.parametrize("key", ["identity_gpus", "gpus_per_frame_actor"])
def test_one_process_is_no_gang(key: str, tiny_cogvideox_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"^parallel.{key}: is 2: a single process has one rank; "
    ):
        render(tiny_cogvideox_folder, tmp_path / "run", f"parallel.{key}=2")


def test_another_config_is_refused(run: Path, tiny_cogvideox_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.num_steps was 2, is 3"):
        render(tiny_cogvideox_folder, run, "sampling.num_steps=3")


@pytest.mark.parametrize("num_events", [6, 14])
def test_a_cancelled_render_goes_on_to_the_same_videos(
    finished: tuple[Path, list[Event]],
    tiny_cogvideox_folder: Path,
    tmp_path: Path,
    num_events: int,
) -> None:
    events = []
    with StoryRenderer(settings(tiny_cogvideox_folder), tmp_path) as renderer:
        for event in renderer.stream(STORY):
            events.append(event)
            if len(events) == num_events:
                renderer.cancel()
        assert renderer.is_cancelled
    steps = [e for e in events[num_events:] if isinstance(e, IdentityStep | FrameStep)]
    assert len(steps) <= 1  # the step that ran
    assert len(kinds(events, Done)) < 5
    assert set(read_run(tmp_path).records) == set(kinds(events, Done))
    render(tiny_cogvideox_folder, tmp_path)
    assert hashes(tmp_path) == hashes(finished[0])


def test_previews_show_what_a_video_becomes_and_change_nothing(
    finished: tuple[Path, list[Event]], tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    events = render(tiny_cogvideox_folder, tmp_path, "output.preview_every=1")
    previews = [event for event in events if isinstance(event, Preview)]
    assert {(event.scene, event.video) for event in previews} == VIDEOS
    assert len(previews) == 2 * len(VIDEOS)
    assert all(event.path.read_bytes().startswith(b"\x89PNG") for event in previews)
    jumps = [e for e in events if isinstance(e, FrameStep | Preview | Done) and e.video == "jumps"]
    after_step = [FrameStep, Preview]  # whatever else is written meanwhile
    assert [type(e) for e in jumps] == [FrameStep] * 2 + after_step * 2 + [Done]
    assert hashes(tmp_path) == hashes(finished[0])


def test_a_kept_cache_spares_the_identity_video(
    finished: tuple[Path, list[Event]], run: Path, tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    kept = f"cache.directory={tmp_path / 'kept'}"
    (run / "forest" / "jumps.mp4").unlink()
    first = render(tiny_cogvideox_folder, run, kept)
    assert [e.step for e in first if isinstance(e, IdentityStep)] == [0, 1]
    (folder,) = (tmp_path / "kept").iterdir()  # of the one scene that was rendered
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.safetensors",
        "step-000.safetensors",
        "step-001.safetensors",
    ]

    overlay = run / "forest" / "overlays" / "jumps.match.png"
    overlay.unlink()
    again = render(tiny_cogvideox_folder, run, kept)
    assert not [e for e in again if isinstance(e, (IdentityStep, Failed))]
    assert kinds(again, FrameStep)[0] == ("forest", "jumps")
    assert overlay.exists()

    step = folder / "step-001.safetensors"
    step.write_bytes(step.read_bytes()[:-1] + b"?")
    overlay.unlink()
    mended = render(tiny_cogvideox_folder, run, kept)
    assert [e.step for e in mended if isinstance(e, IdentityStep)] == [0, 1]
    assert not kinds(mended, Failed)
    (folder / "manifest.safetensors").unlink()
    overlay.unlink()
    assert [e for e in render(tiny_cogvideox_folder, run, kept) if isinstance(e, IdentityStep)]
    assert hashes(run) == hashes(finished[0])


def test_leaving_the_stream_stops_the_render(tiny_cogvideox_folder: Path, tmp_path: Path) -> None:
    with StoryRenderer(settings(tiny_cogvideox_folder), tmp_path) as renderer:
        for event in renderer.stream(STORY):
            if isinstance(event, IdentityStep):
                break
    assert len(read_run(tmp_path).records) == 0
    with StoryRenderer(settings(tiny_cogvideox_folder), tmp_path) as renderer:
        next(renderer.stream(STORY))  # the lock is free


def test_what_is_rendered_is_kept_when_the_stream_is_left(
    finished: tuple[Path, list[Event]], tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    with StoryRenderer(settings(tiny_cogvideox_folder), tmp_path) as renderer:
        for event in renderer.stream(STORY):
            if isinstance(event, FrameStep):
                break
    assert hashes(tmp_path) == {
        key: value for key, value in hashes(finished[0]).items() if key == ("forest", "identity")
    }


def test_what_cannot_be_written_ends_the_render_and_is_not_journaled(
    finished: tuple[Path, list[Event]], tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    obstacle = tmp_path / "forest" / "masks"  # a file where a folder must be
    with StoryRenderer(settings(tiny_cogvideox_folder), tmp_path) as renderer:
        events = renderer.stream(STORY)
        while not isinstance(next(events), IdentityStep):
            pass
        obstacle.parent.mkdir(exist_ok=True)
        obstacle.touch()
        with pytest.raises(WorkerError, match=r"^cannot write .*masks.*: make room"):
            list(events)
    assert ("forest", "identity") not in read_run(tmp_path).records
    obstacle.unlink()
    render(tiny_cogvideox_folder, tmp_path)
    assert hashes(tmp_path) == hashes(finished[0])


def test_method_none_is_the_model_alone(
    finished: tuple[Path, list[Event]], tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    render(tiny_cogvideox_folder, tmp_path, "method.name=none")
    assert not list(tmp_path.rglob("*.match.png"))
    ours, vanilla = hashes(finished[0]), hashes(tmp_path)
    unchanged = {video for video in VIDEOS if ours[video] == vanilla[video]}
    assert unchanged == {("forest", "identity"), ("sea", "identity")}

    plan = render_plan(STORY, settings(tiny_cogvideox_folder, "method.name=none"))
    worker = ModelWorker(plan.config, plan.facts)
    video = plan.scenes[0].frames[0]
    *_, (_, latents, _) = denoise(
        worker.model,
        worker.new_context(),
        Run((0, 1)),
        prompt_embeds=worker.model.encode_prompts([video.prompt]),
        negative_embeds=worker.model.encode_prompts([Prompt("")]),
        noise=worker.model.initial_noise(video.seed, plan.config.video),
        noise_seed=video.seed,
        sampling=plan.config.sampling,
    )
    frames = worker.model.decode(latents)
    assert vanilla["forest", "jumps"][1] == array_sha256(frames)


def test_the_driver_imports_no_torch() -> None:
    code = (
        "import sys, bachvid.driver.renderer; "
        "print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Importing torch takes longer than rendering: it is done once, and every attempt is a fork of it.
KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import bachvid.models.cogvideox
from test_driver import STORY, StoryRenderer, settings

chance = random.Random(int(sys.argv[4]))
kills = 0
while True:
    child = os.fork()
    if child == 0:
        with StoryRenderer(settings(Path(sys.argv[2])), Path(sys.argv[3])) as renderer:
            for event in renderer.stream(STORY):
                pass
        os._exit(0)
    # Longer every time: a slow machine must get through at last.
    end = time.monotonic() + chance.uniform(0.1, 1.0) * (1 + kills)
    while time.monotonic() < end and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    else:
        if time.monotonic() < end:
            break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
print(kills)
"""


def test_killed_at_any_moment_the_videos_are_the_same(
    finished: tuple[Path, list[Event]], tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", KILLER, str(Path(__file__).parent)]
    found = subprocess.run(
        [*command, str(tiny_cogvideox_folder), str(out), "0"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(found.stdout.split()[-1]) >= 1
    assert hashes(out) == hashes(finished[0])
    assert not list(out.rglob("*.tmp"))
    rows = [json.loads(row) for row in (out / "journal.jsonl").read_text().splitlines()]
    assert sorted((row["scene"], row["video"]) for row in rows[1:]) == sorted(VIDEOS)
