"""How a piece lies in bytes, and the sum that guards it.

A piece is one tensor of one site, [B, M, H, D] (`bachvid.layout.records`): its bytes, then padding.
Pure functions; knows no store. Shape suffixes: see `bachvid.attention.control`.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]

_ALIGNMENT = 64  # bytes: a cache line
_PAGE_BYTES = 4096
_CHUNK_BYTES = 64 * _PAGE_BYTES  # fits the cache of any CPU core


def piece_bytes(dtype: torch.dtype, shape: torch.Size) -> int:
    """Return the bytes of a piece of this dtype and shape, padding included."""
    num_bytes = max(shape.numel() * dtype.itemsize, 1)  # of no row too: each begins aligned
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def piece_tensor(piece: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """Return a view of a piece (uint8) as the tensor [B, M, H, D] that it is."""
    return piece[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


def by_heads(piece: Bytes, dtype: torch.dtype, shape: torch.Size) -> Bytes:
    """Return a view of a piece as [B, M, H, bytes of a head]: NumPy has no bfloat16."""
    whole = piece[: shape.numel() * dtype.itemsize]
    return whole.reshape(*shape[:3], shape[3] * dtype.itemsize)


def checksum(piece: Bytes, salt: bytes = b"") -> bytes:
    """Return a sum of bytes, taken at memory speed: against accidents, not against intent.

    A digest over the sum of every 4 KiB. It detects every change within one word, and a page that
    is lost, stale, repeated or moved (but for chances of 2**-64). It does not detect two changes
    within 4 KiB whose sums cancel, such as two words that changed places.
    `salt` (16 bytes at most) is what the bytes belong to: with another one the sum is another one.
    """
    digest = hashlib.blake2b(digest_size=8, salt=salt)
    for start in range(0, len(piece), _CHUNK_BYTES):
        _add_sums(digest, piece[start : start + _CHUNK_BYTES])
    return digest.digest()


def copy_and_sum(source: Bytes, target: Bytes, salt: bytes = b"") -> bytes:
    """Copy bytes and return the checksum of what is in `target` then.

    Chunk by chunk, so that the sum finds the copy in the CPU's cache: 0.8 of the speed of a plain
    copy, where copying all and then summing all has 0.6.
    """
    digest = hashlib.blake2b(digest_size=8, salt=salt)
    for start in range(0, len(source), _CHUNK_BYTES):
        chunk = target[start : start + _CHUNK_BYTES]
        np.copyto(chunk, source[start : start + _CHUNK_BYTES])
        _add_sums(digest, chunk)
    return digest.digest()


def _add_sums(digest: hashlib.blake2b, chunk: Bytes) -> None:
    """Add the sum of each page of a chunk, and what is behind the last whole page as it is."""
    whole = len(chunk) - len(chunk) % _PAGE_BYTES
    pages = chunk[:whole].view(np.uint64).reshape(-1, _PAGE_BYTES // 8)
    digest.update(np.add.reduce(pages, axis=1).data)
    digest.update(chunk[whole:].data)
