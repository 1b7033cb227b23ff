"""PSNR-BG: how alike two clips of a scene are where neither shows the character."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bachvid.metrics.background import dilate

CAP_DB = 60.0
"""Reported for identical backgrounds, whose PSNR is infinite: half a grey level is 54 dB."""


def psnr_bg(
    first_FHWC: NDArray[np.uint8],
    second_FHWC: NDArray[np.uint8],
    foreground_FHW: NDArray[np.bool_],
    *,
    margin: int = 2,
) -> float:
    """Return the PSNR in dB outside `foreground_FHW`, the union of both clips' masks.

    The masks are grown by `margin` pixels, since a mask rarely holds all of the figure's edge.
    At most CAP_DB; NaN where no background is left.
    """
    background = ~dilate(foreground_FHW, margin)
    if not background.any():
        return float("nan")
    error = first_FHWC[background].astype(np.float64) - second_FHWC[background]
    mean_square = float(np.mean(error**2))
    if mean_square == 0.0:
        return CAP_DB
    return min(CAP_DB, float(10 * np.log10(255.0**2 / mean_square)))
