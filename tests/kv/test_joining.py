"""Blocks that are not what a reader expects: each is found by its header or by a checksum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import CONFIG, HEADS, KEYS_AND_VALUES, MIXED, WHOLE, Recording, damage, with_header

from bachvid.errors import CacheMissError, CorruptShardError
from bachvid.kv.joining import BlockJoiner, Layer
from bachvid.kv.packing import PackedStep, sum_of_rows
from bachvid.layout.gangs import BRANCHES, Gang, RankShare
from bachvid.layout.records import AttentionSite, Records, RecordSet

SAME_CONFIG = "; render the identity video and its frame videos with the same story and config"
CUT = Recording(MIXED, rows=(0, 3, 4))


def new_joiner(records: Records = MIXED, share: RankShare = WHOLE) -> BlockJoiner:
    return BlockJoiner(share=share, records=records, config_hash=CONFIG)


def blocks_of(recording: Recording, step: int, gang: Gang) -> list[PackedStep]:
    return [block for block in recording.blocks(step, gang) if block]


def damaged_sites(
    packs: list[PackedStep], step: int, share: RankShare = WHOLE, records: Records = MIXED
) -> set[AttentionSite]:
    """Stage every piece of a step as a layer of its own; return the sites of damaged ones."""
    joiner = new_joiner(records, share)
    joiner.check(step, packs)
    slot = joiner.new_slot(1)
    layers: list[Layer] = [(piece,) for piece in records.pieces(step, share.branches)]
    found = {joiner.stage(packs, layer, slot)[1] for layer in layers}
    return {site for site in found if site is not None}


def test_what_is_whole_passes() -> None:
    assert damaged_sites([CUT.pack(3)], 3) == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config_hash": "b" * 64},
            "what came as step 2 is step 2 under config bbbbbbbbbbbb, wanted is step 2 under "
            "aaaaaaaaaaaa",
        ),
        (
            {"step": 1},
            "what came as step 2 is step 1 under config aaaaaaaaaaaa, wanted is step 2 under "
            "aaaaaaaaaaaa",
        ),
    ],
)
def test_a_block_of_another_step_or_config_is_refused(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(CacheMissError) as error:
        new_joiner().check(2, [with_header(CUT.pack(2), **change)])
    assert str(error.value) == message + SAME_CONFIG


def test_a_block_of_other_records_is_refused() -> None:
    longer = Records((*MIXED.sets, RecordSet(("key",), (9,), (2,), ("cond",))))
    for written, read, message in (
        (
            KEYS_AND_VALUES,
            MIXED,
            "piece 0 of step 2 is the key of step 2, layer 1, branch uncond, ",
        ),
        (longer, MIXED, "the key of step 2, layer 9, branch cond, wanted is none"),
        (MIXED, longer, "is none, wanted is the key of step 2, layer 9, branch cond"),
    ):
        with pytest.raises(CacheMissError) as error:
            new_joiner(read).check(2, [Recording(written).pack(2)])
        assert message in str(error.value)


def test_a_swapped_kind_is_found() -> None:
    packed, site = CUT.pack(2), AttentionSite(2, 4, "cond")
    pieces, checksums = list(packed.header.pieces), list(packed.header.checksums)
    key, value = (pieces.index((site, kind)) for kind in ("key", "value"))

    def swap(items: list[object]) -> tuple[object, ...]:
        items[key], items[value] = items[value], items[key]
        return tuple(items)

    with pytest.raises(CacheMissError) as error:
        new_joiner().check(2, [with_header(packed, pieces=swap([*pieces]))])
    assert str(error.value) == (
        f"what came as piece {key} of step 2 is the value of step 2, layer 4, branch cond, wanted "
        f"is the key of step 2, layer 4, branch cond{SAME_CONFIG}"
    )
    payload = packed.payload.reshape(len(pieces), -1).copy()
    payload[[key, value]] = payload[[value, key]]
    assert damaged_sites([PackedStep(packed.header, payload.reshape(-1))], 2) == {site}
    assert damaged_sites([with_header(packed, checksums=swap([*checksums]))], 2) == {site}


def test_a_swapped_row_set_is_found() -> None:
    packed, other = CUT.pack(2), np.array([0, 3, 5])
    with pytest.raises(CorruptShardError, match="row set or size are not those that were recorded"):
        new_joiner().check(2, [with_header(packed, positions_M=other)])
    with pytest.raises(CorruptShardError, match="row set or size"):
        new_joiner().check(2, [with_header(packed, positions_M=None)])
    short = with_header(packed, positions_M=other[:2], rows_checksum=sum_of_rows(other[:2]))
    with pytest.raises(CorruptShardError, match="row set or size"):
        new_joiner().check(2, [short])
    swapped = with_header(packed, positions_M=other, rows_checksum=sum_of_rows(other))
    assert damaged_sites([swapped], 2) == set(MIXED.sites(2))
    all_rows = with_header(packed, positions_M=None, rows_checksum=b"")
    assert damaged_sites([all_rows], 2) == set(MIXED.sites(2))


@pytest.mark.parametrize("rows", [(0, 3, 5), (0, 3), None], ids=str)
def test_all_blocks_have_one_row_set(rows: tuple[int, ...] | None) -> None:
    other = replace(CUT, rows=rows)
    first, second = blocks_of(CUT, 2, Gang(2))[0], blocks_of(other, 2, Gang(2))[1]
    with pytest.raises(CacheMissError, match=r"a block of step 2 has \d rows in torch.float32,"):
        new_joiner().check(2, [first, second])
    joiner = new_joiner()
    joiner.check(2, [CUT.pack(2)])
    with pytest.raises(CacheMissError, match=r"a block of step 3 has \d rows in torch.float32,"):
        joiner.check(3, [other.pack(3)])


def test_a_payload_of_another_size_is_refused() -> None:
    packed = CUT.pack(2)
    for payload in (packed.payload[:-64], np.append(packed.payload, packed.payload[:64])):
        with pytest.raises(CorruptShardError, match="row set or size are not"):
            new_joiner().check(2, [PackedStep(packed.header, payload)])


@pytest.mark.parametrize(
    ("kept", "heads"),
    [([0], "[0, 1, 2]"), ([0, 1, 1], "[0, 1, 2, 3, 3, 4, 4, 5, 5]"), ([], "[]")],
    ids=["one lacks", "one twice", "none"],
)
def test_a_step_that_lacks_heads_or_has_them_twice_is_refused(kept: list[int], heads: str) -> None:
    blocks = blocks_of(CUT, 2, Gang(2))
    with pytest.raises(CacheMissError) as error:
        new_joiner().check(2, [blocks[rank] for rank in kept])
    assert f"of step 2, branch cond, came the heads {heads}, wanted are [0, 1" in str(error.value)


def test_a_branch_that_lacks_is_named_and_one_without_pieces_does_not() -> None:
    uncond, cond = blocks_of(CUT, 2, Gang(2, cfg=2))
    for missing, block in (("cond", uncond), ("uncond", cond)):
        with pytest.raises(CacheMissError, match=f"of step 2, branch {missing}, came the heads"):
            new_joiner().check(2, [block])
    only_cond = Recording(Records((RecordSet(("out",), (1,), (2,), ("cond",)),)))
    (block,) = blocks_of(only_cond, 2, Gang(2, cfg=2))
    new_joiner(only_cond.records).check(2, [block])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), change=st.integers(1, 255), writers=st.sampled_from([1, 2, 3]))
def test_any_changed_byte_is_found_where_it_is_also_by_readers_of_some_heads(
    data: st.DataObject, change: int, writers: int
) -> None:
    blocks = blocks_of(CUT, 3, Gang(writers))
    rank = data.draw(st.integers(0, writers - 1))
    packed = blocks[rank]
    position = data.draw(st.integers(0, packed.payload.nbytes - 1))
    size = packed.payload.nbytes // len(packed.header.pieces)
    site, _ = packed.header.pieces[position // size]
    packs = [*blocks[:rank], damage(packed, position, change), *blocks[rank + 1 :]]
    assert damaged_sites(packs, 3) == {site}
    others = RankShare(BRANCHES, 1, HEADS - 2)  # some heads of every writer
    assert damaged_sites(packs, 3, others) == {site}
