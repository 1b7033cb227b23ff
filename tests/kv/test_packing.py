from __future__ import annotations

import numpy as np
import pytest
import torch
from recordings import CONFIG, KEYS_AND_VALUES, MIXED, STEPS, Recording, sent

from bachvid.kv.pieces import checksum
from bachvid.layout.gangs import Gang
from bachvid.layout.records import AttentionSite


def test_a_header_tells_the_pieces_of_a_rank_and_how_they_lie() -> None:
    recording = Recording(MIXED, torch.bfloat16, (0, 3, 4))
    uncond, cond = (block for block in recording.blocks(3, Gang(2, cfg=2)) if block)
    assert (uncond.header.step, uncond.header.config_hash) == (3, CONFIG)
    assert uncond.header.pieces == MIXED.pieces(3, ("uncond",))
    assert cond.header.pieces == MIXED.pieces(3, ("cond",))
    assert (cond.header.dtype, cond.header.shape) == ("bfloat16", (1, 3, 6, 5))
    third = sent([block for block in recording.blocks(2, Gang(3)) if block][2])
    assert (third.header.first_head, third.header.shape) == (4, (1, 3, 2, 5))
    assert third.header.positions_M is not None
    assert third.header.positions_M.tolist() == [0, 3, 4]


def test_a_sum_is_of_a_piece_and_of_the_rows_that_it_has() -> None:
    packed = Recording(MIXED).pack(2)
    pieces = packed.payload.reshape(len(packed.header.pieces), -1)
    assert packed.header.checksums == tuple(checksum(piece) for piece in pieces)
    some, others = (Recording(MIXED, rows=rows).pack(2) for rows in ((0, 1, 2), (0, 1, 3)))
    zeros = np.zeros(256, np.uint8)
    assert len({some.header.rows_checksum, others.header.rows_checksum, b""}) == 3
    assert checksum(zeros, some.header.rows_checksum) != checksum(zeros)


def test_steps_that_differ_in_pieces_share_one_buffer() -> None:
    recording = Recording(MIXED)
    packer = recording.packer()
    buffers = set()
    for step, num_pieces in ((0, 13), (3, 16), (2, 15)):
        recording.put(packer, step)
        packed = packer.take(step)
        assert packed is not None
        assert len(packed.header.checksums) == num_pieces
        assert packed.payload.nbytes == num_pieces * 896  # 840 bytes of each, 56 of padding
        assert packed.payload.tobytes() == recording.pack(step).payload.tobytes()
        buffers.add(packed.payload.__array_interface__["data"][0])
    assert len(buffers) == 1


def test_a_step_that_is_packed_again_counts_once_and_nothing_is_given_twice() -> None:
    recording = Recording(KEYS_AND_VALUES)
    packer = recording.packer()
    assert packer.take(0) is None
    for step in (0, 2, 0):
        recording.put(packer, step)
        assert packer.take(step) is not None
        assert packer.take(step) is None
    assert packer.nbytes == 2 * len(KEYS_AND_VALUES.pieces(0)) * 896


def test_a_site_that_is_put_again_is_replaced() -> None:
    packer = Recording(MIXED).packer()
    for version in (0, 1):
        Recording(MIXED, version=version).put(packer, 2)
    packed = packer.take(2)
    assert packed is not None
    assert packed.header.checksums == Recording(MIXED, version=1).pack(2).header.checksums


def test_half_a_step_is_never_packed() -> None:
    recording = Recording(MIXED)
    packer = recording.packer()
    packer.put(recording.shard(AttentionSite(0, 1, "cond")))
    with pytest.raises(AssertionError, match="not a whole step"):
        packer.take(0)
    with pytest.raises(AssertionError, match="another step was put"):
        packer.take(2)
    with pytest.raises(AssertionError, match="take the step before"):
        packer.put(recording.shard(AttentionSite(2, 1, "cond")))


def test_a_packer_takes_what_is_recorded_and_one_row_set() -> None:
    recording = Recording(MIXED, rows=(0, 3, 4))
    packer = recording.packer()
    with pytest.raises(AssertionError, match="other kinds than recorded"):
        packer.put(Recording(KEYS_AND_VALUES).shard(AttentionSite(2, 4, "cond")))
    recording.put(packer, STEPS[0])
    packer.take(STEPS[0])
    for rows in ((0, 3, 5), None):
        with pytest.raises(AssertionError, match="the row set is a fixed one"):
            Recording(MIXED, rows=rows).put(packer, STEPS[1])
