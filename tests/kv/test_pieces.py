from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bachvid.kv.pieces import checksum, copy_and_sum


@settings(max_examples=60, deadline=None)
@given(
    num_bytes=st.integers(1, 600_000),
    position=st.integers(0, 10**6),
    change=st.integers(1, 255),
    seed=st.integers(0, 9),
)
def test_the_checksum_sees_every_single_byte(
    num_bytes: int, position: int, change: int, seed: int
) -> None:
    piece = np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)
    changed = piece.copy()
    changed[position % len(piece)] ^= change
    assert checksum(changed) != checksum(piece)


def test_the_checksum_sees_pages_that_are_lost_or_exchanged() -> None:
    pages = np.random.default_rng(0).integers(0, 256, (5, 4096), dtype=np.uint8)
    exchanged, lost = pages[[1, 0, 2, 3, 4]], pages.copy()
    lost[2] = 0
    sums = {checksum(piece.reshape(-1)) for piece in (pages, exchanged, lost)}
    assert len(sums) == 3


@pytest.mark.parametrize("num_bytes", [1, 64, 4096, 4100, 262_144, 600_001])
def test_a_copy_has_the_checksum_of_its_source(num_bytes: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)
    target = np.zeros_like(source)
    assert copy_and_sum(source, target) == checksum(source)
    assert np.array_equal(target, source)
