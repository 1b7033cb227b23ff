"""Whole runs are measured: who is compared with whom, and what ends up in the files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pyarrow import parquet
from pydantic import JsonValue
from rich.console import Console

from bachvid.atomic import write_atomically
from bachvid.engine.results import Frames
from bachvid.errors import ConfigError
from bachvid.inputs.story import Story
from bachvid.metrics.evaluate import evaluate_run, vanilla_twin
from bachvid.metrics.psnr_bg import CAP_DB
from bachvid.metrics.table import evaluation_table, write_results
from bachvid.output.journal import RunHeader, VideoRecord
from bachvid.output.mp4 import write_mp4
from bachvid.output.pixels import enlarge
from bachvid.output.run_directory import RunDirectory
from bachvid.planning.config import RenderConfig
from bachvid.storybook.judge import JudgeReading

STORY: dict[str, JsonValue] = {
    "title": "t",
    "seed": 0,
    "scenes": [
        {
            "id": scene,
            "background": "a snowy forest",
            "character": "a girl",
            "identity": "jumps",
            "actions": [
                {"id": "jumps", "text": "jumps", "seed": None},
                {"id": "sits", "text": "sits", "seed": None},
            ],
        }
        for scene in ("one", "two")
    ],
}
VIDEOS = ("identity", "jumps", "sits")
TOKENS = np.zeros((3, 4, 4), bool)
TOKENS[:, 1:3, 1:3] = True  # pixels 8 to 24 of 32


def clip(background: int, figure: int) -> Frames:
    """Stripes of `background`, and a figure that gets brighter by 3 from frame to frame."""
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    frames[:, :, ::2] = background
    for index, frame in enumerate(frames):
        frame[8:24, 8:24] = figure + 3 * index
    return frames


def make_run(
    path: Path,
    clips: Mapping[tuple[str, str], Frames],
    *,
    method: str = "bachvid",
    raw: bool = True,
    model: str = "/models/tiny",
) -> Path:
    """Write a run directory by hand; videos without a clip failed."""
    config = RenderConfig.model_validate({"method": {"name": method}, "model": {"id": model}})
    header = RunHeader(
        story=STORY,
        config=config.model_dump(mode="json"),
        story_hash="s",
        config_hash=method,
        bachvid="0",
    )

    def write(path: Path, **arrays: NDArray[np.generic]) -> str:
        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)

        return write_atomically(path, save)

    with RunDirectory(path, header) as run:
        for (scene, video), frames in clips.items():
            files = {
                f"{scene}/masks/{video}.npz": write(
                    run.file(scene, "masks", f"{video}.npz"), foreground=TOKENS
                ),
                f"{scene}/{video}.mp4": write_atomically(
                    run.file(scene, f"{video}.mp4"),
                    lambda path, frames=frames: write_mp4(  # type: ignore[misc]
                        enlarge(frames, 4), path, fps=8, crf=4, metadata={"enlargement": 4}
                    ),
                ),
            }
            if raw:
                files[f"{scene}/frames/{video}.npz"] = write(
                    run.file(scene, "frames", f"{video}.npz"), frames=frames
                )
            run.commit(
                VideoRecord(
                    scene=scene,
                    video=video,
                    prompt=f"a snowy forest, a girl, {video.replace('identity', 'jumps')}",
                    seed=1,
                    latents_sha256="",
                    frames_sha256="",
                    files=files,
                    seconds={"main_run": 2.0 if method == "none" else 3.0},
                    cache_bytes=2**20,
                )
            )
    return path


def both_scenes(clips: Mapping[str, Frames]) -> dict[tuple[str, str], Frames]:
    return {(scene, video): frames for scene in ("one", "two") for video, frames in clips.items()}


CONSISTENT = both_scenes({"identity": clip(80, 9), "jumps": clip(80, 9), "sits": clip(80, 90)})
DRIFTING = both_scenes({"identity": clip(80, 9), "jumps": clip(80, 9), "sits": clip(100, 90)})


def judge(frames: NDArray[np.uint8]) -> JudgeReading:
    """Read a clip by the colour of its figure: 9 jumps with a hat, 90 stands without."""
    figures = [int(video[0, 8, 8, 0]) for video in frames]
    mask = np.zeros(frames.shape[:-1], bool)
    mask[:, :, 8:24, 8:24] = True
    return JudgeReading(
        background=["a snowy forest"] * len(frames),
        character=["a girl"] * len(frames),
        action=["jumps" if figure < 50 else "stands" for figure in figures],
        attributes={
            "hat": ["top hat" if figure < 50 else "none" for figure in figures],
            "sky": ["sun"] * len(frames),
        },
        foreground=mask,
    )


def mean(path: Path, metric: str) -> float:
    summary = evaluate_run(path, judge=judge).summary(metric)
    assert summary is not None
    return summary.mean


def test_a_consistent_run_and_a_drifting_one(tmp_path: Path) -> None:
    ours = make_run(tmp_path / "ours", CONSISTENT)
    theirs = make_run(tmp_path / "theirs", DRIFTING, method="none")
    assert mean(ours, "psnr_bg") == CAP_DB
    # Half of the columns differ by 20.
    assert mean(theirs, "psnr_bg") == pytest.approx(10 * np.log10(255**2 / (20**2 / 2)))
    assert mean(ours, "ssim_bg") == pytest.approx(1)
    assert mean(ours, "motion") == pytest.approx(3)
    assert mean(ours, "attributes") == pytest.approx(3 / 4)  # the hat of one of two videos
    assert mean(ours, "prompt_background") == 1
    assert mean(ours, "prompt_action") == 1 / 2
    assert mean(ours, "seconds") == 3
    assert mean(ours, "cache_mebibytes") == 1
    assert mean(ours, "rendered") == 1


def test_a_pair_that_is_the_same_video_without_a_method_does_not_count(tmp_path: Path) -> None:
    """Identity and `jumps` have one prompt and one seed; two pairs a scene are left."""
    evaluation = evaluate_run(make_run(tmp_path, CONSISTENT), judge=judge)
    pairs = [(m.video, m.detail) for m in evaluation.measurements if m.metric == "psnr_bg"]
    assert pairs == [("identity", "sits"), ("jumps", "sits")] * 2


def test_a_failed_video_counts_against_success_and_nothing_else(tmp_path: Path) -> None:
    clips = {key: frames for key, frames in CONSISTENT.items() if key != ("two", "sits")}
    evaluation = evaluate_run(make_run(tmp_path, clips), judge=judge)
    rendered = evaluation.summary("rendered")
    assert rendered is not None
    assert rendered.mean == pytest.approx(5 / 6)
    assert rendered.num_values == 6
    motion = evaluation.summary("motion")
    assert motion is not None
    assert motion.num_values == 3


def test_without_a_judge_the_masks_of_the_method_are_used(tmp_path: Path) -> None:
    evaluation = evaluate_run(make_run(tmp_path, CONSISTENT))
    psnr = evaluation.summary("psnr_bg")
    assert psnr is not None
    assert psnr.mean == CAP_DB  # the figures, which differ, are inside the masks
    assert evaluation.summary("attributes") is None
    assert evaluation.notes == ("no judge for this model: no attributes, no prompt accuracy",)


def test_without_raw_frames_the_mp4_is_read_and_noted(tmp_path: Path) -> None:
    evaluation = evaluate_run(make_run(tmp_path, CONSISTENT, raw=False), judge=judge)
    psnr = evaluation.summary("psnr_bg")
    assert psnr is not None
    assert psnr.mean > 40
    assert evaluation.notes[0].startswith("frames were read back from mp4 (lossy)")


def test_differences_are_paired_by_scene(tmp_path: Path) -> None:
    mixed = {**CONSISTENT, ("two", "sits"): clip(100, 90)}
    ours = evaluate_run(make_run(tmp_path / "ours", CONSISTENT), judge=judge)
    theirs = evaluate_run(make_run(tmp_path / "theirs", mixed, method="none"), judge=judge)
    difference = ours.difference("psnr_bg", theirs)
    assert difference is not None
    gain = CAP_DB - 10 * np.log10(255**2 / (20**2 / 2))
    assert difference.mean == pytest.approx(gain / 2)
    assert difference.standard_error == pytest.approx(gain / 2)  # 0 and gain, over two scenes
    assert difference.num_values == 2


def test_the_results_are_written_for_programs_and_people(tmp_path: Path) -> None:
    ours = evaluate_run(make_run(tmp_path / "ours", CONSISTENT), judge=judge)
    theirs = evaluate_run(make_run(tmp_path / "theirs", DRIFTING, method="none"), judge=judge)
    write_results(tmp_path, [ours, theirs])
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["runs"]["bachvid"]["metrics"]["psnr_bg"]["mean"] == CAP_DB
    assert written["differences"]["bachvid - none"]["seconds"]["mean"] == 1.0
    rows = parquet.read_table(tmp_path / "metrics.parquet").to_pylist()
    assert len(rows) == len(ours.measurements) + len(theirs.measurements)
    assert rows[0] == {"method": "bachvid", **asdict(ours.measurements[0])}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(evaluation_table([ours, theirs]))
    text = console.export_text()
    assert "PSNR-BG, pairs (dB)" in text
    assert "+50.0 %" in text  # 3 seconds against 2


def test_the_twin_is_the_same_story_without_a_method(tmp_path: Path) -> None:
    twin = vanilla_twin(make_run(tmp_path, CONSISTENT))
    assert twin.out == tmp_path / "against.none"
    assert twin.config.method.name == "none"
    assert twin.story == Story.model_validate(STORY)


def test_a_run_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no finished video"):
        evaluate_run(make_run(tmp_path / "run", {}))
    with pytest.raises(ConfigError, match="is no run directory"):
        evaluate_run(tmp_path)


def test_a_lost_file_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, CONSISTENT, raw=False)
    (run / "one" / "sits.mp4").unlink()
    with pytest.raises(ConfigError, match=r"one/sits\.mp4 is gone: render the story"):
        evaluate_run(run)
