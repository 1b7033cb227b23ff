"""What rendering a video leaves: plain data and arrays. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bachvid.engine.arrays import Foreground, Frames


@dataclass(frozen=True, slots=True)
class MatchedTokens:
    """For every frame token its identity token, and whether it saw that token's keys."""

    index_N: NDArray[np.int64]
    used: Foreground


@dataclass(frozen=True, slots=True)
class RenderedVideo:
    """One video and what became known about it.

    `frames` are in pixels, `foreground` in tokens, `latents` in the model's own layout.
    """

    frames: Frames
    latents: NDArray[np.float32]
    foreground: Foreground
    matched: MatchedTokens | None
    latents_sha256: str
    frames_sha256: str
    seconds: Mapping[str, float]
    recoveries: tuple[str, ...]
    cache_bytes: int
