"""Recordings of made-up numbers: what an identity video would put, and what a reader must get."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from bachvid.kv.cache import PieceSink, PieceSource, Shard
from bachvid.kv.packing import PackedStep, StepPacker
from bachvid.kv.pulling import FetchStep, PulledPieces
from bachvid.layout.gangs import BRANCHES, Branch, Gang, RankShare, cut_passes
from bachvid.layout.records import KINDS, AttentionSite, Kind, Records, RecordSet

VIDEO_TOKENS, HEADS, HEAD_DIM = 7, 6, 5  # the pieces need padding in every dtype
CONFIG = "a" * 64
WHOLE = Gang().share(0, HEADS)
Passes = tuple[tuple[Branch, ...], ...]
BATCHED: Passes = (("uncond", "cond"),)  # as CogVideoX guides
APART: Passes = (("cond",), ("uncond",))  # as Wan does
GANGS = (Gang(), Gang(2), Gang(3), Gang(2, cfg=2))

STEPS = (0, 2, 3)
KEYS_AND_VALUES = Records((RecordSet(("key", "value"), (1, 4, 5, 8), STEPS, BRANCHES),))
MIXED = Records(
    (
        RecordSet(("key", "value"), (1, 4, 6), STEPS, BRANCHES),
        RecordSet(("out",), (4, 6), (2, 3), ("cond",)),
        RecordSet(("query",), (0,), STEPS, ("cond",)),
        RecordSet(("query",), (6,), (3,), ("uncond",)),
    )
)
RECORDS: dict[str, Records] = {
    **{kind: Records((RecordSet((kind,), (1, 4), STEPS, BRANCHES),)) for kind in KINDS},
    "all kinds": Records((RecordSet(KINDS, (1, 4), STEPS, ("cond",)),)),
    "mixed": MIXED,
}
ROW_SETS: dict[str, tuple[int, ...] | None] = {
    "all rows": None,
    "some rows": (0, 3, 4),
    "no row": (),
}


@cache
def whole_piece(version: int, site: AttentionSite, kind: Kind) -> Tensor:
    place = (version, site.step, site.layer, BRANCHES.index(site.branch), KINDS.index(kind))
    generator = torch.Generator().manual_seed(hash(place))
    return torch.randn(1, VIDEO_TOKENS, HEADS, HEAD_DIM, generator=generator)


@dataclass(frozen=True)
class Recording:
    """The pieces of a video: numbers by site and kind, the same at every call."""

    records: Records = KEYS_AND_VALUES
    dtype: torch.dtype = torch.float32
    rows: tuple[int, ...] | None = None
    version: int = 0
    device: str = "cpu"

    def shard(self, site: AttentionSite, share: RankShare = WHOLE) -> Shard:
        positions_M = None if self.rows is None else torch.tensor(self.rows, dtype=torch.int64)
        pieces = {
            kind: self._piece(site, kind)[:, :, share.first_head : share.last_head].clone()
            for kind in self.records.kinds(site)
        }
        return Shard(site, pieces, positions_M)

    def _piece(self, site: AttentionSite, kind: Kind) -> Tensor:
        rows = range(VIDEO_TOKENS) if self.rows is None else self.rows
        return whole_piece(self.version, site, kind)[:, list(rows)].to(self.device, self.dtype)

    def put(self, sink: PieceSink, step: int, share: RankShare = WHOLE) -> None:
        """Put what a rank records of a step."""
        for site in self.records.sites(step, share.branches):
            sink.put(self.shard(site, share))

    def packer(self, share: RankShare = WHOLE) -> StepPacker:
        return StepPacker(share=share, records=self.records, config_hash=CONFIG)

    def pack(self, step: int) -> PackedStep:
        """Return the block of a gang of one."""
        (packed,) = self.blocks(step, Gang())
        assert packed is not None
        return packed

    def blocks(self, step: int, gang: Gang) -> list[PackedStep | None]:
        """Return the block of each rank of a gang; None if it records nothing of the step."""
        blocks = []
        for share in gang.shares(HEADS):
            packer = self.packer(share)
            self.put(packer, step, share)
            blocks.append(packer.take(step))
        return blocks

    def reads(
        self, steps: Sequence[int], share: RankShare = WHOLE, passes: Passes = BATCHED
    ) -> list[AttentionSite]:
        """Return the sites that a rank reads, in order, by loops of its own."""
        return [
            AttentionSite(step, layer, branch)
            for step in steps
            for together in cut_passes(passes, share.branches)
            for layer in range(10)
            for branch in together
            if self.records.kinds(AttentionSite(step, layer, branch))
        ]

    def check(self, source: PieceSource, site: AttentionSite, share: RankShare = WHOLE) -> None:
        """Check that a source gives the shard of a site, bit for bit."""
        given, expected = source.get(site), self.shard(site, share)
        assert given.site == site
        assert given.pieces.keys() == expected.pieces.keys()
        for kind, piece in expected.pieces.items():
            assert given.pieces[kind].dtype == self.dtype
            assert torch.equal(given.pieces[kind].cpu(), piece.cpu()), kind
        assert (given.positions_M is None) == (self.rows is None)
        if self.rows is not None:
            assert given.positions_M is not None
            assert tuple(given.positions_M.tolist()) == self.rows

    @contextmanager
    def pulled(
        self, fetch: FetchStep, share: RankShare = WHOLE, passes: Passes = BATCHED
    ) -> Iterator[PulledPieces]:
        source = PulledPieces(
            fetch, share=share, records=self.records, passes=passes, config_hash=CONFIG
        )
        try:
            yield source
        finally:
            source.close()


def sent(packed: PackedStep) -> PackedStep:
    """Cross a process boundary the way Ray does it: the arrays out of band and read-only."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 5000  # the header alone
    arrived: PackedStep = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])
    return arrived


def with_header(packed: PackedStep, **changes: object) -> PackedStep:
    return PackedStep(replace(packed.header, **changes), packed.payload)  # type: ignore[arg-type]


def damage(packed: PackedStep, position: int, change: int = 1) -> PackedStep:
    payload = packed.payload.copy()
    payload[position] ^= change
    return PackedStep(packed.header, payload)


def always(*packs: PackedStep) -> Callable[[int, int], Sequence[PackedStep]]:
    """Return a `fetch` that gives these blocks, whatever the place."""
    return lambda run, place: packs
