"""How the keys and values of one site lie in bytes, and the sum that guards them.

A piece is the bytes of one site: its key, then its value, then padding. Pure functions; knows no
store. Shape suffixes: see `bachvid.attention`.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]

_ALIGNMENT = 64  # bytes: a cache line, and a whole number of the words that are summed
_SUMMED_WORDS = 512  # 4 KiB, a page


def piece_bytes(dtype: torch.dtype, shape: torch.Size) -> int:
    """Give the bytes of a piece, for the dtype and the shape of its key."""
    num_bytes = 2 * shape.numel() * dtype.itemsize
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def key_and_value(piece: Tensor, dtype: torch.dtype, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """View a piece (uint8) as key_BMHD and value_BMHD."""
    both = piece[: 2 * shape.numel() * dtype.itemsize].view(dtype).view(2, *shape)
    return both[0], both[1]


def checksum(piece: Bytes) -> bytes:
    """Sum up bytes: at memory speed, against accidents, not against intent.

    A digest over the sum of every 4 KiB. It detects every change within one word, and a page that
    is lost, stale, repeated or moved (but for chances of 2**-64). It does not detect two changes
    within 4 KiB whose sums cancel, such as two words that changed places.
    """
    num_words = len(piece) // 8
    num_summed = num_words - num_words % _SUMMED_WORDS
    words = piece[: 8 * num_summed].view(np.uint64)
    sums = np.add.reduce(words.reshape(-1, _SUMMED_WORDS), axis=1)
    digest = hashlib.blake2b(sums.data, digest_size=8)
    digest.update(piece[8 * num_summed :].data)
    return digest.digest()
