"""SSIM-BG: whether two clips of a scene have the same structure outside the character."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bachvid.metrics.background import dilate, luminance

WINDOW = 7  # pixels, uniform: the default of scikit-image
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim_bg(
    first_FHWC: NDArray[np.uint8],
    second_FHWC: NDArray[np.uint8],
    foreground_FHW: NDArray[np.bool_],
) -> float:
    """Return the mean SSIM (-1..1) of luma over windows without a foreground pixel.

    `foreground_FHW` is the union of both clips' masks. NaN where no such window is.
    Source: Wang et al., Image quality assessment, IEEE TIP 13 (4), 2004, Eq. (13).
    """
    reach = WINDOW // 2
    inner = (slice(None), slice(reach, -reach), slice(reach, -reach))  # whole windows only
    background = ~dilate(foreground_FHW, reach)[inner]
    if not background.any():
        return float("nan")
    first, second = (luminance(clip).astype(np.float64) for clip in (first_FHWC, second_FHWC))
    mean_first, mean_second = _window_mean(first), _window_mean(second)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    var_first = unbiased * (_window_mean(first**2) - mean_first**2)
    var_second = unbiased * (_window_mean(second**2) - mean_second**2)
    covariance = unbiased * (_window_mean(first * second) - mean_first * mean_second)
    similarity = ((2 * mean_first * mean_second + _C1) * (2 * covariance + _C2)) / (
        (mean_first**2 + mean_second**2 + _C1) * (var_first + var_second + _C2)
    )
    return float(similarity[background].mean())


def _window_mean(image_FHW: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over each whole WINDOW x WINDOW window, by differences of cumulative sums."""
    sums = image_FHW
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (1, 0)
        total = np.pad(sums.cumsum(axis=axis), pad)
        size = sums.shape[axis]
        sums = total.take(range(WINDOW, size + 1), axis) - total.take(
            range(size + 1 - WINDOW), axis
        )
    return sums / WINDOW**2
