"""The keys and values of one step in one block of bytes, on their way out of an identity video.

The ranks of a gang pack their branches and heads, one block each. Knows no Ray, no method and no
model. Shape suffixes: see `bachvid.attention.attend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bachvid.attention.control import AttentionSite
from bachvid.errors import CacheMissError
from bachvid.kv.cache import KVShard
from bachvid.kv.pieces import Bytes, checksum, key_and_value, piece_bytes
from bachvid.layout.gangs import Branch, RankShare


@dataclass(frozen=True, slots=True)
class StepHeader:
    """What a packed step holds: the key tensors' dtype, by torch's name, and their shape.

    They are of the heads from `first_head` on. `checksums` are those of the sites, in their order.
    """

    step: int
    sites: tuple[AttentionSite, ...]
    dtype: str
    shape: tuple[int, ...]
    first_head: int
    checksums: tuple[bytes, ...]
    config_hash: str


@dataclass(frozen=True, slots=True, eq=False)
class PackedStep:
    """All keys and values that one rank has of one step.

    It pickles with the payload out of band: without a copy. The payload holds the pieces of the
    sites, in their order; all are of one size.
    """

    header: StepHeader
    payload: Bytes


def sites_of(
    step: int, layers: Sequence[int], branches: Sequence[Branch]
) -> tuple[AttentionSite, ...]:
    """Return the sites of one step in the order in which they are packed."""
    return tuple(AttentionSite(step, layer, branch) for layer in layers for branch in branches)


def sites_read(
    step: int, layers: Sequence[int], passes: Sequence[Sequence[Branch]]
) -> tuple[AttentionSite, ...]:
    """Return the sites of one step in the order in which its forwards read them."""
    return tuple(site for branches in passes for site in sites_of(step, layers, branches))


class StepPacker:
    """The store that an identity video writes: it packs one step at a time.

    Each rank of a gang has one, for the branches and heads of its `share`. Memory: one step. Every
    step is packed into the same buffer, because memory that is written for the first time costs
    several times the copy. So a packed step must have been sent, or copied, before the next shard
    is put. Ray does: it copies what a generator yields before it resumes the generator.
    """

    def __init__(
        self,
        *,
        share: RankShare,
        layers: Sequence[int],
        branches: Sequence[Branch],
        config_hash: str,
    ) -> None:
        self._share, self._layers = share, tuple(layers)
        self._branches = tuple(branch for branch in branches if branch in share.branches)
        self._config_hash = config_hash
        self._buffer: Tensor | None = None
        self._dtype, self._shape = torch.uint8, torch.Size()
        self._checksums: dict[AttentionSite, bytes] = {}
        self._step_bytes: dict[int, int] = {}

    def put(self, shard: KVShard) -> None:
        """Copy a shard of the current step; one of the same site is replaced."""
        sites = sites_of(shard.site.step, self._layers, self._branches)
        assert self._checksums.keys() <= set(sites), "take the step before"
        key_BMHD = shard.key_BMHD
        num_bytes = piece_bytes(key_BMHD.dtype, key_BMHD.shape)
        if self._buffer is None:
            self._dtype, self._shape = key_BMHD.dtype, key_BMHD.shape
            # Zeros: the padding is part of the checksum. Pinned: the GPU writes it directly.
            self._buffer = torch.zeros(
                num_bytes * len(sites), dtype=torch.uint8, pin_memory=key_BMHD.is_cuda
            )
        assert (key_BMHD.dtype, key_BMHD.shape) == (self._dtype, self._shape)
        start = sites.index(shard.site) * num_bytes
        piece = self._buffer[start : start + num_bytes]
        packed_key, packed_value = key_and_value(piece, self._dtype, self._shape)
        packed_key.copy_(key_BMHD)
        packed_value.copy_(shard.value_BMHD)
        self._checksums[shard.site] = checksum(piece.numpy())

    def take(self, step: int) -> PackedStep | None:
        """Return the packed step, None if nothing was put, and be ready for the next one."""
        if not self._checksums:
            return None
        sites = sites_of(step, self._layers, self._branches)
        assert self._buffer is not None
        assert self._checksums.keys() == set(sites), "not a whole step"
        header = StepHeader(
            step=step,
            sites=sites,
            dtype=str(self._dtype).removeprefix("torch."),
            shape=tuple(self._shape),
            first_head=self._share.first_head,
            checksums=tuple(self._checksums[site] for site in sites),
            config_hash=self._config_hash,
        )
        self._checksums = {}
        self._step_bytes[step] = self._buffer.nbytes
        return PackedStep(header, self._buffer.numpy())

    def begin(self, steps: Sequence[int]) -> None:
        """Do nothing: nobody reads here."""

    def get(self, site: AttentionSite) -> KVShard:
        """Refuse: raises CacheMissError."""
        raise CacheMissError(
            f"no identity keys and values for step {site.step}, layer {site.layer}: they are sent "
            f"away, step by step; read them where they arrive"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all steps that were packed; a step that was packed again counts once."""
        return sum(self._step_bytes.values())
