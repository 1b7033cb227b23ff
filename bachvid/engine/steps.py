"""What a worker says while it renders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from bachvid.engine.arrays import Frames


Phase = Literal["pre_pass", "main_run"]


@dataclass(frozen=True, slots=True)
class RunStep:
    """A worker has done a denoising step of a video; runs of a video count from 0."""

    run: int
    step: int


@dataclass(frozen=True, slots=True)
class PreviewFrames:
    """What a worker expects a video to become, uint8 [frames, height, width, 3]."""

    frames: Frames
