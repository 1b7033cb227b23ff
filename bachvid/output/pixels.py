"""Arithmetic on frames: enlarging by whole factors, rounding to pixels.

Frames are uint8, (frames, height, width, 3), RGB. Knows NumPy alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bachvid.engine.results import Frames


def enlargement(height: int, width: int, min_height: int) -> int:
    """Return the factor, 1 or an even one, that reaches `min_height` and makes both sides even.

    H.264 with 4:2:0 chroma stores one colour for 2x2 pixels: sides must be even, and with an
    even factor no colour runs into the next pixel.
    """
    factor = -(-min_height // height)
    if factor <= 1 and height % 2 == 0 and width % 2 == 0:
        return 1
    return factor + factor % 2


def enlarge(frames: Frames, factor: int) -> Frames:
    """Return frames with every pixel repeated `factor` times in both directions."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def to_pixels(values: NDArray[np.floating]) -> Frames:
    """Return values of 0 to 255, rounded and clipped, as uint8 of the same shape."""
    pixels: Frames = np.rint(values).clip(0, 255).astype(np.uint8)
    return pixels
