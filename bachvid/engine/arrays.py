"""Names for arrays of pixels and masks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
"""Pixels, uint8, (frames, height, width, 3), RGB."""

Foreground = NDArray[np.bool_]
"""True where the character is: (frames, height, width), in pixels or in tokens."""
