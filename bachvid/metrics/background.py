"""The background of a clip: all pixels away from every foreground mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def dilate(mask_FHW: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """Grow a mask by `pixels` in the eight directions, within each frame."""
    grown = mask_FHW
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (pixels, pixels)
        padded = np.pad(grown, pad)
        size = grown.shape[axis]
        shifted = [padded.take(range(k, k + size), axis=axis) for k in range(2 * pixels + 1)]
        grown = np.logical_or.reduce(shifted)
    return grown


def luminance(frames_FHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return BT.601 luma, float32, 0..255, (F, H, W)."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    luma: NDArray[np.float32] = frames_FHWC.astype(np.float32) @ weights
    return luma
