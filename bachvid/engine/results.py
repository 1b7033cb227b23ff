"""The messages of a worker while it renders, and its result: plain data and arrays. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
"""Pixels, uint8, (frames, height, width, 3), RGB."""

Foreground = NDArray[np.bool_]
"""True where the character is: (frames, height, width), in pixels or in tokens."""


@dataclass(frozen=True, slots=True)
class RunStep:
    """A worker has done a step of a video; runs of a video count from 0."""

    run: int
    step: int


@dataclass(frozen=True, slots=True)
class PreviewFrames:
    """A worker's estimate of the finished video."""

    frames: Frames


@dataclass(frozen=True, slots=True)
class MatchedTokens:
    """For every frame token its identity token, and whether it saw that token's keys."""

    index_N: NDArray[np.int64]
    used: Foreground


@dataclass(frozen=True, slots=True)
class RenderedVideo:
    """A finished video, with its foreground, matches, hashes and timings.

    `frames` are in pixels, `foreground` in tokens, `latents` in the model's own layout.
    `foreground` is None for a method without a mask, `matched` for one that matches nothing.
    """

    frames: Frames
    latents: NDArray[np.float32]
    foreground: Foreground | None
    matched: MatchedTokens | None
    latents_sha256: str
    frames_sha256: str
    seconds: Mapping[str, float]
    recoveries: tuple[str, ...]
