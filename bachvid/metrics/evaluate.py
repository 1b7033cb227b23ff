"""Measures a run directory: each metric on each video or pair of videos that it applies to.

Only videos of the same scene are compared: each frame video with the identity video, and for the
background every two videos with each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bachvid.catalog.registry import EMBEDDED
from bachvid.errors import ConfigError
from bachvid.inputs.story import IDENTITY_ID, Scene, Story
from bachvid.methods.base import MethodConfig
from bachvid.methods.none import NoneConfig
from bachvid.metrics.attributes import attribute_agreement
from bachvid.metrics.cost import cost
from bachvid.metrics.motion import motion
from bachvid.metrics.prompt_accuracy import prompt_accuracy
from bachvid.metrics.psnr_bg import psnr_bg
from bachvid.metrics.sharpness import sharpness_bg
from bachvid.metrics.ssim_bg import ssim_bg
from bachvid.metrics.success import success
from bachvid.output.files import read_video
from bachvid.output.journal import RunContents, VideoRecord, read_run
from bachvid.output.overlays import upsample_foreground
from bachvid.planning.config import RenderConfig

if TYPE_CHECKING:
    from bachvid.storybook.judge import JudgeReading

ReadClips = Callable[[NDArray[np.uint8]], "JudgeReading"]  # a Judge


@dataclass(frozen=True, slots=True)
class Measurement:
    """One value. `detail` is the other video of a pair, an attribute, or empty."""

    metric: str
    scene: str
    video: str
    detail: str
    value: float


class Summary(NamedTuple):
    """The mean of a metric, and the standard error of the scenes' means if there are several."""

    mean: float
    standard_error: float | None
    num_values: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measurements of one run, with `notes` that a reader of the numbers must know."""

    path: Path
    method: str
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...]

    def summary(self, metric: str) -> Summary | None:
        """Summarise a metric; None if nothing was measured."""
        by_scene = self._by_scene(metric)
        values = [value for scene in by_scene.values() for value in scene]
        if not values:
            return None
        return Summary(
            float(np.mean(values)),
            _standard_error([float(np.mean(scene)) for scene in by_scene.values()]),
            len(values),
        )

    def difference(self, metric: str, other: Evaluation) -> Summary | None:
        """Summarise this run less another of the same story, scene by scene."""
        mine, theirs = self._by_scene(metric), other._by_scene(metric)
        paired = [
            float(np.mean(mine[scene]) - np.mean(theirs[scene]))
            for scene in mine
            if scene in theirs
        ]
        if not paired:
            return None
        return Summary(float(np.mean(paired)), _standard_error(paired), len(paired))

    def _by_scene(self, metric: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for item in self.measurements:
            if item.metric == metric and not math.isnan(item.value):
                found.setdefault(item.scene, []).append(item.value)
        return found


class Twin(NamedTuple):
    """How to render the same story without any method, into a folder of the run."""

    story: Story
    config: RenderConfig
    out: Path


def vanilla_twin(run: Path) -> Twin:
    """Return what `--against none` renders. Raises ConfigError if `run` is no run directory."""
    contents = read_run(run)
    config = RenderConfig.from_values(contents.header.config, source=str(run))
    # Raw frames may have been added later: the header knows the first render only.
    raw = any(contents.file(*key, f"frames/{key[1]}.npz") for key in contents.records)
    twin = config.model_copy(
        update={
            "method": _without_method(config.method),
            "output": config.output.model_copy(update={"overlays": False, "frames": raw}),
        }
    )
    # No scene can have this name: ids have no dot.
    return Twin(Story.model_validate(contents.header.story), twin, run / "against.none")


def _without_method(config: MethodConfig) -> NoneConfig:
    """Return the section of `none`, with masks taken as the method takes them."""
    shared = {key: value for key, value in config if key in NoneConfig.model_fields}
    return NoneConfig(**{**shared, "name": "none"})


def evaluate_run(path: Path, *, judge: ReadClips | None = None) -> Evaluation:
    """Measure all videos of a run directory.

    Raw frames are read where the run has them (`output.frames`), else the mp4 files, which are
    lossy; a note says so. Clips of the embedded model are read by the judge, whose masks are then
    used because they measure every method alike. For other models there is no judge, and the
    masks are those of the method. A given `judge` is used for any model.

    Raises ConfigError if `path` is no run directory, or has no finished video.
    """
    run = read_run(path)
    config = RenderConfig.from_values(run.header.config, source=str(path))
    story = Story.model_validate(run.header.story)
    if not run.records:
        raise ConfigError(f"{path} has no finished video: render its story first")
    if judge is None and config.model.id in EMBEDDED:
        from bachvid.storybook.judge import Judge  # imports torch

        judge = Judge.load()
    notes = [] if judge else ["no judge for this model: no attributes, no prompt accuracy"]
    raw = [run.file(*video, f"frames/{video[1]}.npz") for video in run.records]
    if not all(path is not None and path.exists() for path in raw):
        notes.append(
            "frames were read back from mp4 (lossy); for exact values render into the same folder "
            "again with --set output.frames=true"
        )
    if judge is None and not any(run.file(*video, _mask_of(video[1])) for video in run.records):
        notes.append(f"the method {config.method.name} takes no masks: no pixels were measured")
    found: list[Measurement] = []
    for scene in story.scenes:
        found += _measure_records(run, scene)
        clips = _load_clips(run, scene, judge)
        if clips is not None:
            found += _measure_pixels(scene, clips)
    unmeasured = sum(math.isnan(item.value) for item in found)
    if unmeasured:
        notes.append(f"{unmeasured} values could not be measured: no background, or no mask")
    return Evaluation(path, config.method.name, tuple(found), tuple(notes))


class _Clips(NamedTuple):
    """The finished videos of a scene: [V, F, H, W, 3] and [V, F, H, W]."""

    records: Sequence[VideoRecord]
    frames: NDArray[np.uint8]
    foreground: NDArray[np.bool_]
    reading: JudgeReading | None


def _load_clips(run: RunContents, scene: Scene, judge: ReadClips | None) -> _Clips | None:
    names = [IDENTITY_ID, *(action.id for action in scene.actions)]
    records = [run.records[scene.id, name] for name in names if (scene.id, name) in run.records]
    if not records:
        return None
    if judge is None and run.file(scene.id, records[0].video, _mask_of(records[0].video)) is None:
        return None
    frames = np.stack([_load_frames(run, record) for record in records])
    if judge is not None:
        reading = judge(frames)
        return _Clips(records, frames, reading.foreground, reading)
    masks = [_load_mask(run, record, clip) for record, clip in zip(records, frames, strict=True)]
    return _Clips(records, frames, np.stack(masks), None)


def _load_frames(run: RunContents, record: VideoRecord) -> NDArray[np.uint8]:
    raw = run.file(record.scene, record.video, f"frames/{record.video}.npz")
    if raw is not None and raw.exists():
        with np.load(raw, allow_pickle=False) as arrays:
            frames: NDArray[np.uint8] = arrays["frames"]
            return frames
    return read_video(_file(run, record, ".mp4"))


def _load_mask(
    run: RunContents, record: VideoRecord, frames: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    path = _file(run, record, _mask_of(record.video))
    with np.load(path, allow_pickle=False) as arrays:
        tokens: NDArray[np.bool_] = arrays["foreground"]
    num_frames, height, width, _ = frames.shape
    ratio = (num_frames - 1) // max(1, len(tokens) - 1)
    return upsample_foreground(tokens, temporal_ratio=ratio, height=height, width=width)


def _mask_of(video: str) -> str:
    return f"masks/{video}.npz"


def _file(run: RunContents, record: VideoRecord, suffix: str) -> Path:
    path = run.file(record.scene, record.video, suffix)
    assert path is not None  # every record has an mp4, and a mask if its method takes any
    if not path.exists():
        raise ConfigError(f"{path} is gone: render the story into {run.path} again to restore it")
    return path


def _measure_records(run: RunContents, scene: Scene) -> Iterator[Measurement]:
    """Success of all videos of a scene; cost of its frame videos."""
    for name in (IDENTITY_ID, *(action.id for action in scene.actions)):
        record = run.records.get((scene.id, name))
        for metric, value in success(record).items():
            yield Measurement(metric, scene.id, name, "", value)
        if record is not None and name != IDENTITY_ID:
            for metric, value in cost(record).items():
                yield Measurement(metric, scene.id, name, "", value)


def _measure_pixels(scene: Scene, clips: _Clips) -> Iterator[Measurement]:
    """Yield all measurements on the frames of a scene."""
    for first, second in itertools.combinations(range(len(clips.records)), 2):
        one, two = clips.records[first], clips.records[second]
        if (one.prompt, one.seed) == (two.prompt, two.seed):
            continue  # without a method, the same video: no sign of consistency
        foreground = clips.foreground[first] | clips.foreground[second]
        for metric, measure in (("psnr_bg", psnr_bg), ("ssim_bg", ssim_bg)):
            value = measure(clips.frames[first], clips.frames[second], foreground)
            yield Measurement(metric, scene.id, one.video, two.video, value)
    for index, record in enumerate(clips.records):
        if record.video == IDENTITY_ID:
            continue
        frames, foreground = clips.frames[index], clips.foreground[index]
        yield Measurement(
            "sharpness_bg", scene.id, record.video, "", sharpness_bg(frames, foreground)
        )
        yield Measurement("motion", scene.id, record.video, "", motion(frames, foreground))
        if clips.reading is not None:
            yield from _measure_reading(scene, clips.records, clips.reading, index)


def _measure_reading(
    scene: Scene, records: Sequence[VideoRecord], reading: JudgeReading, index: int
) -> Iterator[Measurement]:
    """What the judge reads of one frame video."""
    video = records[index].video
    asked: Mapping[str, str] = {
        "background": scene.background,
        "character": scene.character,
        "action": next(action.text for action in scene.actions if action.id == video),
    }
    seen = {segment: getattr(reading, segment)[index] for segment in asked}
    for segment, value in prompt_accuracy(asked, seen).items():
        yield Measurement(f"prompt_{segment}", scene.id, video, "", value)
    if records[0].video == IDENTITY_ID:
        agreement = attribute_agreement(reading.attributes, identity=0, video=index)
        for name, value in agreement.items():
            yield Measurement("attributes", scene.id, video, name, value)


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))
