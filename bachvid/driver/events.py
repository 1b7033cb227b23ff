"""What a render tells its caller while it runs. Plain data: no torch, no arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

from bachvid.engine.results import Phase


@dataclass(frozen=True, slots=True)
class Queued:
    """A video that this render will make."""

    scene: str
    video: str


@dataclass(frozen=True, slots=True)
class IdentityStep:
    """A denoising step of a scene's identity video is done; steps count from 0."""

    scene: str
    step: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Published:
    """The identity cache of a scene is complete: its frame videos can be rendered."""

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
    """A picture of what a video will become, as far as its step tells; the next one replaces it."""

    scene: str
    video: str
    path: Path


@dataclass(frozen=True, slots=True)
class Done:
    """A video is in the run directory; `is_resumed` if it was there before this render.

    `seconds` are those of rendering it; `recoveries` is what the method had to repair.
    """

    scene: str
    video: str
    path: Path
    seconds: float
    recoveries: tuple[str, ...]
    is_resumed: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """A video could not be rendered; rendering again tries it again."""

    scene: str
    video: str
    error: str


Event = Queued | IdentityStep | Published | FrameStep | Preview | Done | Failed
