"""Checks the blocks of a gang's ranks, and joins them into the layers that one rank reads.

A rank reads its branches and heads, whichever ranks wrote them. Depends on no method, no model and
not on Ray. Shape suffixes: see `bachvid.attention.control`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from bachvid.errors import CacheMissError, CorruptShardError
from bachvid.kv.cache import SAME_CONFIG, Shard, format_site
from bachvid.kv.packing import PackedStep, StepHeader, sum_of_rows
from bachvid.kv.pieces import Bytes, by_heads, checksum, copy_and_sum, piece_bytes, piece_tensor
from bachvid.layout.gangs import BRANCHES, RankShare
from bachvid.layout.records import AttentionSite, Kind, Records

Layer = tuple[tuple[AttentionSite, Kind], ...]  # the pieces of one layer in one forward


def sites_of(layer: Layer) -> tuple[AttentionSite, ...]:
    """Return the sites of a layer for the branches that share a forward, in their order."""
    return tuple(dict.fromkeys(site for site, _ in layer))


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The format of pieces that all blocks of a recording share; only their heads differ."""

    dtype: torch.dtype
    batch: int
    num_rows: int
    head_dim: int
    rows_checksum: bytes

    @classmethod
    def of(cls, header: StepHeader) -> BlockLayout:
        """Return the layout of the block with this header."""
        batch, num_rows, _, head_dim = header.shape
        dtype = getattr(torch, header.dtype)
        return cls(dtype, batch, num_rows, head_dim, header.rows_checksum)

    def shape(self, num_heads: int) -> torch.Size:
        """Return the shape of a piece with this many heads."""
        return torch.Size((self.batch, self.num_rows, num_heads, self.head_dim))


@dataclass(frozen=True, slots=True)
class StagedLayer:
    """A layer in its slot [pieces, bytes per piece], and the format of its pieces."""

    layer: Layer
    slot: Tensor
    dtype: torch.dtype
    shape: torch.Size
    positions_M: Tensor | None

    def shard(self, site: AttentionSite) -> Shard:
        """Return the shard of one of the layer's sites; its pieces are views of the slot."""
        pieces = {
            kind: piece_tensor(piece, self.dtype, self.shape)
            for (at, kind), piece in zip(self.layer, self.slot, strict=False)
            if at == site
        }
        return Shard(site, pieces, self.positions_M)


class BlockJoiner:
    """Checks and joins the blocks of one run, for the rank that reads `share`."""

    def __init__(self, *, share: RankShare, records: Records, config_hash: str) -> None:
        self._share, self._records, self._config_hash = share, records, config_hash
        self._layout: BlockLayout | None = None  # as the first block says
        self._positions_M: Tensor | None = None

    def check(self, step: int, packs: Sequence[PackedStep]) -> None:
        """Check that the blocks hold everything that this rank reads of a step, exactly once.

        Raises:
            CacheMissError: they are of another step or config, have other pieces or another row
                set than this reader or the blocks before, or lack heads.
            CorruptShardError: a header does not agree with its row set or its size.
        """
        for packed in packs:
            self._check_header(step, packed.header)
            self._check_layout(packed)
        share = self._share
        wanted = list(range(share.first_head, share.last_head))
        pieces = self._records.pieces(step, share.branches)
        of_branches = {site.branch: (site, kind) for site, kind in pieces}
        for branch, piece in of_branches.items():
            heads = sorted(head for packed in packs for head in _heads_read(packed, piece, share))
            if heads != wanted:
                raise CacheMissError(
                    f"of step {step}, branch {branch}, came the heads {heads}, wanted are "
                    f"{wanted}; {SAME_CONFIG}"
                )

    def new_slot(self, num_pieces: int) -> Tensor:
        """Return an empty slot for `num_pieces` pieces; only after blocks were checked."""
        assert self._layout is not None, "check the blocks before"
        size = piece_bytes(self._layout.dtype, self._layout.shape(self._share.num_heads))
        return torch.empty(
            num_pieces, size, dtype=torch.uint8, pin_memory=torch.cuda.is_available()
        )

    def stage(
        self, packs: Sequence[PackedStep], layer: Layer, slot: Tensor
    ) -> tuple[StagedLayer, AttentionSite | None]:
        """Copy a layer's pieces into `slot`; also return a site with a damaged piece, if any."""
        layout = self._layout
        assert layout is not None, "check the blocks before"
        shape = layout.shape(self._share.num_heads)
        staged = StagedLayer(layer, slot, layout.dtype, shape, self._positions_M)
        damaged = None
        for piece, target in zip(layer, slot.numpy(), strict=False):
            for packed in packs:
                if not _copy_heads(packed, piece, self._share, target, staged):
                    damaged = piece[0]
        return staged, damaged

    def _check_header(self, step: int, header: StepHeader) -> None:
        if (header.step, header.config_hash) != (step, self._config_hash):
            raise CacheMissError(
                f"what came as step {step} is step {header.step} under config "
                f"{header.config_hash[:12]}, wanted is step {step} under "
                f"{self._config_hash[:12]}; {SAME_CONFIG}"
            )
        found = {site.branch for site, _ in header.pieces}
        branches = [branch for branch in BRANCHES if branch in found]
        pairs = zip_longest(header.pieces, self._records.pieces(step, branches))
        for index, (given, wanted) in enumerate(pairs):
            if given != wanted:
                raise CacheMissError(
                    f"what came as piece {index} of step {step} is {_format_piece(given)}, wanted "
                    f"is {_format_piece(wanted)}; {SAME_CONFIG}"
                )

    def _check_layout(self, packed: PackedStep) -> None:
        header, layout = packed.header, BlockLayout.of(packed.header)
        positions_M = header.positions_M
        num_bytes = piece_bytes(layout.dtype, torch.Size(header.shape)) * len(header.pieces)
        if (
            sum_of_rows(positions_M) != header.rows_checksum
            or (positions_M is not None and len(positions_M) != layout.num_rows)
            or packed.payload.nbytes != num_bytes
        ):
            raise CorruptShardError(
                f"the identity pieces of step {header.step} are damaged: row set or size are not "
                f"those that were recorded; they are dropped, and the identity video is rendered "
                f"again"
            )
        if self._layout is None:
            self._layout = layout
            if positions_M is not None:  # a copy: other processes may share what was fetched
                self._positions_M = torch.from_numpy(positions_M.copy())
        if layout != self._layout:
            raise CacheMissError(
                f"a block of step {header.step} has {layout.num_rows} rows in {layout.dtype}, the "
                f"first block that came had {self._layout.num_rows} in {self._layout.dtype}: row "
                f"set, dtype and sizes must be the same; {SAME_CONFIG}"
            )


def _heads_read(packed: PackedStep, piece: tuple[AttentionSite, Kind], share: RankShare) -> range:
    """Return the heads that are both in a block and in a share."""
    header = packed.header
    if piece not in header.pieces:
        return range(0)
    first = max(header.first_head, share.first_head)
    return range(first, min(header.first_head + header.shape[2], share.last_head))


def _copy_heads(
    packed: PackedStep,
    piece: tuple[AttentionSite, Kind],
    share: RankShare,
    target: Bytes,
    staged: StagedLayer,
) -> bool:
    """Copy a block's part of a piece into `target`; return whether it is undamaged."""
    header, heads = packed.header, _heads_read(packed, piece, share)
    if not heads:
        return True
    index, shape = header.pieces.index(piece), torch.Size(header.shape)
    size = piece_bytes(staged.dtype, shape)
    source = packed.payload[index * size : (index + 1) * size]
    if (header.first_head, shape) == (share.first_head, staged.shape):
        return copy_and_sum(source, target, header.rows_checksum) == header.checksums[index]
    # The checksum covers all heads of the block, so it cannot be taken while copying some.
    read = slice(heads.start - header.first_head, heads.stop - header.first_head)
    written = slice(heads.start - share.first_head, heads.stop - share.first_head)
    np.copyto(
        by_heads(target, staged.dtype, staged.shape)[..., written, :],
        by_heads(source, staged.dtype, shape)[..., read, :],
    )
    return checksum(source, header.rows_checksum) == header.checksums[index]


def _format_piece(piece: tuple[AttentionSite, Kind] | None) -> str:
    if piece is None:
        return "none"
    site, kind = piece
    return f"the {kind} of {format_site(site)}"
