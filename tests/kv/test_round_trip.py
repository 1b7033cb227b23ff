"""What is recorded comes back bit for bit: through memory, files and blocks that are pulled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import (
    APART,
    BATCHED,
    CONFIG,
    GANGS,
    HEAD_DIM,
    HEADS,
    MIXED,
    RECORDS,
    ROW_SETS,
    STEPS,
    VIDEO_TOKENS,
    Passes,
    Recording,
    sent,
)

from bachvid.errors import CacheMissError
from bachvid.kv.cache import MemoryPieces
from bachvid.kv.files import FilePieces
from bachvid.kv.packing import PackedStep
from bachvid.kv.pieces import piece_bytes
from bachvid.layout.gangs import BRANCHES, Gang, overlapping_ranks
from bachvid.layout.records import KINDS, Records, RecordSet

T = TypeVar("T")
READS = (3, 0, 0, 2, 0)  # in any order, and again: at once, and later

records_of = pytest.mark.parametrize("records", RECORDS.values(), ids=list(RECORDS))
rows_of = pytest.mark.parametrize("rows", ROW_SETS.values(), ids=list(ROW_SETS))


@records_of
@rows_of
@pytest.mark.parametrize("gang", [Gang(), Gang(2), Gang(3)], ids=str)
def test_every_rank_gets_back_what_it_put_into_memory_or_files(
    records: Records, rows: tuple[int, ...] | None, gang: Gang, tmp_path: Path
) -> None:
    recording = Recording(records, torch.bfloat16, rows)
    num_rows = VIDEO_TOKENS if rows is None else len(rows)
    for rank, share in enumerate(gang.shares(HEADS)):
        folder = tmp_path / str(rank)
        for sink, source in (
            ((memory := MemoryPieces()), memory),
            (
                FilePieces(folder, records=records, config_hash=CONFIG),
                FilePieces(folder, records=records, config_hash=CONFIG),
            ),
        ):
            for step in STEPS:
                recording.put(sink, step, share)
            assert sink.nbytes == records.num_pieces * num_rows * share.num_heads * HEAD_DIM * 2
            source.begin(READS)
            for site in recording.reads(READS, share):
                recording.check(source, site, share)


def pull_and_check(
    recording: Recording,
    writers: Gang,
    readers: Gang,
    *,
    passes: Passes = BATCHED,
    reads: Sequence[int] = READS,
) -> None:
    """Let every rank of `readers` pull what it reads of the blocks of `writers`, in any order."""
    records, shares = recording.records, writers.shares(HEADS)
    blocks = {step: recording.blocks(step, writers) for step in records.steps}
    for share in readers.shares(HEADS):
        needed = overlapping_ranks(share, shares, records.branches)[::-1]

        def fetch(run: int, place: int, needed: list[int] = needed) -> list[PackedStep]:
            # A fetched step is let go before the next one: no reader may point into it.
            return [sent(block) for rank in needed if (block := blocks[reads[place]][rank])]

        with recording.pulled(fetch, share, passes) as source:
            source.begin(reads)
            for site in recording.reads(reads, share, passes):
                recording.check(source, site, share)
            with pytest.raises(CacheMissError, match="nothing is next"):
                source.get(records.sites(records.steps[0])[0])


@records_of
@rows_of
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_and_row_set_is_pulled_as_it_was_packed(
    records: Records, rows: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    pull_and_check(Recording(records, dtype, rows), Gang(), Gang())


@pytest.mark.parametrize("passes", [BATCHED, APART])
@pytest.mark.parametrize("writers", [*GANGS, Gang(12, cfg=2)], ids=str)
@pytest.mark.parametrize("readers", [*GANGS, Gang(12, cfg=2)], ids=str)
def test_every_rank_reads_its_branches_and_heads_whoever_wrote_them(
    readers: Gang, writers: Gang, passes: Passes
) -> None:
    for records in (MIXED, RECORDS["all kinds"]):
        recording = Recording(records, torch.bfloat16, (1, 6))
        pull_and_check(recording, writers, readers, passes=passes, reads=(2, 0))


def subsets(values: Sequence[T]) -> st.SearchStrategy[tuple[T, ...]]:
    return st.lists(st.sampled_from(values), min_size=1, unique=True).map(tuple)


row_sets = st.sets(st.integers(0, VIDEO_TOKENS - 1)).map(lambda rows: tuple(sorted(rows)))


record_sets: st.SearchStrategy[RecordSet] = st.builds(
    RecordSet,
    kinds=subsets(KINDS),
    layers=subsets(range(4)),
    steps=subsets(range(3)),
    branches=subsets(BRANCHES),
)


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    sets=st.lists(record_sets, min_size=1, max_size=3).map(tuple),
    rows=st.none() | row_sets,
    writers=st.sampled_from(GANGS),
    readers=st.sampled_from(GANGS),
    passes=st.sampled_from([BATCHED, APART]),
)
def test_any_records_are_pulled_in_any_order(
    data: st.DataObject,
    sets: tuple[RecordSet, ...],
    rows: tuple[int, ...] | None,
    writers: Gang,
    readers: Gang,
    passes: Passes,
) -> None:
    recording = Recording(Records(sets), rows=rows)
    reads = data.draw(st.lists(st.sampled_from(recording.records.steps), max_size=4))
    pull_and_check(recording, writers, readers, passes=passes, reads=reads)


@records_of
@rows_of
def test_bytes_packed_are_those_of_all_pieces_with_their_padding(
    records: Records, rows: tuple[int, ...] | None
) -> None:
    recording = Recording(records, torch.float16, rows)
    num_rows = VIDEO_TOKENS if rows is None else len(rows)
    for gang in GANGS:
        packed_bytes = 0
        for share in gang.shares(HEADS):
            packer = recording.packer(share)
            for step in STEPS:
                recording.put(packer, step, share)
                packer.take(step)
            packed_bytes += packer.nbytes
        ranks_of_a_branch = gang.sequence
        size = num_rows * (HEADS // ranks_of_a_branch) * HEAD_DIM * 2
        padded = piece_bytes(
            torch.float16, torch.Size((1, num_rows, HEADS // ranks_of_a_branch, HEAD_DIM))
        )
        assert size <= padded <= size + 64
        assert packed_bytes == records.num_pieces * ranks_of_a_branch * padded


def test_the_order_of_the_sites_put_does_not_matter() -> None:
    recording = Recording(MIXED)
    packer = recording.packer()
    for site in reversed(MIXED.sites(3)):
        packer.put(recording.shard(site))
    packed = packer.take(3)
    assert packed is not None
    assert packed.payload.tobytes() == recording.pack(3).payload.tobytes()
