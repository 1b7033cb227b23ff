"""The events that a render yields while it runs. Plain data: no torch, no arrays.

The events of one video come in the order in which they happened. Those of several videos, which
are rendered and written side by side, may come in another order than in the render before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bachvid.scheduling.pool import WorkerLost, WorkerPlaced

__all__ = [
    "Done",
    "Event",
    "Failed",
    "FrameStep",
    "IdentityStep",
    "Lost",
    "Preview",
    "Published",
    "Queued",
    "Started",
    "WorkerLost",
    "WorkerPlaced",
]


Phase = Literal["pre_pass", "main_run"]


@dataclass(frozen=True, slots=True)
class Queued:
    """A video that this render will make."""

    scene: str
    video: str


@dataclass(frozen=True, slots=True)
class Started:
    """A worker was given a video. Comes again if the video is rendered again."""

    scene: str
    video: str
    worker: int


@dataclass(frozen=True, slots=True)
class IdentityStep:
    """A denoising step of a scene's identity video is done; steps count from 0."""

    scene: str
    step: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Published:
    """The identity cache of a scene is complete; frame videos may be running already."""

    scene: str
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class FrameStep:
    """A denoising step of a frame video is done; a pre-pass has fewer steps than the main run."""

    scene: str
    video: str
    phase: Phase
    step: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A picture of the estimated video. Each preview of a video replaces the one before."""

    scene: str
    video: str
    path: Path


@dataclass(frozen=True, slots=True)
class Lost:
    """An attempt at a video was lost, with its worker or with the pieces that it reads.

    It is rendered again, or `Failed` follows.
    """

    scene: str
    video: str
    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """A video is in the run directory; `is_resumed` if it was there before this render.

    `seconds` are the time of rendering; `waited` is the part of it spent waiting for pieces of the
    identity video, on a cluster. `recoveries` lists what the method had to repair.
    """

    scene: str
    video: str
    path: Path
    seconds: float
    recoveries: tuple[str, ...]
    is_resumed: bool
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """A video could not be rendered; rendering again tries it again."""

    scene: str
    video: str
    error: str


VideoEvent = (
    Queued | Started | IdentityStep | Published | FrameStep | Preview | Lost | Done | Failed
)
Event = VideoEvent | WorkerPlaced | WorkerLost
