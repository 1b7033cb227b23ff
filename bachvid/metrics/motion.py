"""Motion: a control, because a frozen character is a consistent one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def motion(frames_FHWC: NDArray[np.uint8], foreground_FHW: NDArray[np.bool_]) -> float:
    """Return the mean absolute difference of neighbouring frames (grey levels) in the mask.

    A pixel counts if the character is there in one of the two frames: where it goes and where
    it leaves are both motion. NaN for a clip of one frame or an empty mask.
    """
    moving = foreground_FHW[1:] | foreground_FHW[:-1]
    if not moving.any():
        return float("nan")
    difference = frames_FHWC[1:].astype(np.int16) - frames_FHWC[:-1]
    return float(np.abs(difference[moving]).mean())
