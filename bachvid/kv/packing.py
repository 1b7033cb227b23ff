"""Packs the pieces of one step of an identity video into one block of bytes.

Each rank of a gang packs its branches and heads into a block. Depends on no method, no model and
not on Ray. Shape suffixes: see `bachvid.attention.control`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bachvid.kv.cache import Shard, have_same_rows
from bachvid.kv.pieces import Bytes, checksum, piece_bytes, piece_tensor
from bachvid.layout.gangs import RankShare
from bachvid.layout.records import AttentionSite, Kind, Records

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class StepHeader:
    """What a packed step holds: which pieces, in order, and the format of each.

    dtype: torch's name for the dtype of every piece.
    shape: [B, M, H, D] of every piece; its heads are those from `first_head` on.
    checksums: one for each piece, in order, salted with `rows_checksum`.
    positions_M: the video positions of the M rows, ascending; None for all rows.
    rows_checksum: `sum_of_rows(positions_M)`.
    """

    step: int
    pieces: tuple[tuple[AttentionSite, Kind], ...]
    dtype: str
    shape: tuple[int, ...]
    first_head: int
    checksums: tuple[bytes, ...]
    positions_M: Positions | None
    rows_checksum: bytes
    config_hash: str


@dataclass(frozen=True, slots=True, eq=False)
class PackedStep:
    """All pieces of one step and one rank, equally long, one after the other.

    Pickles without a copy: the payload is out of band.
    """

    header: StepHeader
    payload: Bytes


def sum_of_rows(positions_M: Positions | None) -> bytes:
    """Return the checksum of a row set; b"" for all rows."""
    return b"" if positions_M is None else checksum(positions_M.view(np.uint8))


class StepPacker:
    """A sink that packs what an identity video records, one step at a time.

    Each rank of a gang has one, for the branches and heads of its `share`. Memory: one step. All
    steps use the same buffer, because the first write to fresh memory costs several times the
    copy. So a packed step must be sent or copied before the next shard is put. Ray does this: it
    copies what a generator yields before it resumes the generator.
    """

    def __init__(self, *, share: RankShare, records: Records, config_hash: str) -> None:
        self._share, self._records, self._config_hash = share, records, config_hash
        self._step = -1
        self._indices: dict[tuple[AttentionSite, Kind], int] = {}  # of the pieces in this step
        self._checksums: dict[int, bytes] = {}  # by index
        self._buffer: Tensor | None = None  # [pieces, bytes of a piece]
        self._dtype, self._shape = torch.uint8, torch.Size()
        self._rows: Tensor | None = None
        self._positions_M: Positions | None = None
        self._rows_checksum = b""
        self._step_bytes: dict[int, int] = {}

    def put(self, shard: Shard) -> None:
        """Copy a shard into the current step; one of the same site is replaced."""
        site = shard.site
        if site.step != self._step:
            assert not self._checksums, "take the step before"
            self._step = site.step
            pieces = self._records.pieces(site.step, self._share.branches)
            self._indices = {piece: index for index, piece in enumerate(pieces)}
        assert shard.pieces.keys() == set(self._records.kinds(site)), "other kinds than recorded"
        buffer = self._prepare(shard) if self._buffer is None else self._buffer
        assert have_same_rows(shard.positions_M, self._rows), "the row set is a fixed one"
        for kind, piece_BMHD in shard.pieces.items():
            assert (piece_BMHD.dtype, piece_BMHD.shape) == (self._dtype, self._shape)
            index = self._indices[site, kind]
            piece_tensor(buffer[index], self._dtype, self._shape).copy_(piece_BMHD)
            self._checksums[index] = checksum(buffer[index].numpy(), self._rows_checksum)

    def _prepare(self, shard: Shard) -> Tensor:
        """Allocate the buffer for the largest step. The first shard gives the format of pieces."""
        first = next(iter(shard.pieces.values()))
        self._dtype, self._shape, self._rows = first.dtype, first.shape, shard.positions_M
        if self._rows is not None:
            self._positions_M = self._rows.cpu().numpy().copy()
            self._rows_checksum = sum_of_rows(self._positions_M)
        branches = self._share.branches
        num_pieces = max(len(self._records.pieces(step, branches)) for step in self._records.steps)
        # Zeros, since the checksum covers the padding; pinned, so that a GPU writes it directly.
        self._buffer = torch.zeros(
            num_pieces,
            piece_bytes(self._dtype, self._shape),
            dtype=torch.uint8,
            pin_memory=first.is_cuda,
        )
        return self._buffer

    def take(self, step: int) -> PackedStep | None:
        """Return the packed step (None if nothing was put) and start the next one."""
        if not self._checksums:
            return None
        assert self._buffer is not None
        assert step == self._step, "another step was put"
        assert len(self._checksums) == len(self._indices), "not a whole step"
        header = StepHeader(
            step=step,
            pieces=tuple(self._indices),
            dtype=str(self._dtype).removeprefix("torch."),
            shape=tuple(self._shape),
            first_head=self._share.first_head,
            checksums=tuple(self._checksums[index] for index in self._indices.values()),
            positions_M=self._positions_M,
            rows_checksum=self._rows_checksum,
            config_hash=self._config_hash,
        )
        self._checksums = {}
        payload = self._buffer[: len(self._indices)].view(-1).numpy()
        self._step_bytes[step] = payload.nbytes
        return PackedStep(header, payload)

    @property
    def nbytes(self) -> int:
        """Bytes of all steps packed; a step that was packed again counts once."""
        return sum(self._step_bytes.values())
