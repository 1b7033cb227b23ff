"""Background sharpness: a control, because blur alone raises PSNR-BG."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bachvid.metrics.background import dilate, luminance


def sharpness_bg(
    frames_FHWC: NDArray[np.uint8], foreground_FHW: NDArray[np.bool_], *, margin: int = 2
) -> float:
    """Return the mean gradient energy of the background's luma (grey levels squared).

    Energy of differences between neighbours, both outside the mask grown by `margin` pixels.
    Compare it between clips of one scene only. NaN where no background is left.
    """
    background = ~dilate(foreground_FHW, margin)
    luma = luminance(frames_FHWC)
    across = np.diff(luma, axis=2)[background[:, :, 1:] & background[:, :, :-1]]
    down = np.diff(luma, axis=1)[background[:, 1:] & background[:, :-1]]
    if not across.size or not down.size:
        return float("nan")
    return float(np.mean(across.astype(np.float64) ** 2) + np.mean(down.astype(np.float64) ** 2))
