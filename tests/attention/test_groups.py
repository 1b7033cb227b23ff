"""The group of one rank; groups of several are tested in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from bachvid.attention.groups import ALONE, pad_rows
from bachvid.layout.tokens import TokenLayout


def test_one_rank_has_everything_and_copies_nothing() -> None:
    layout, x = TokenLayout(2, 3, 1, 1), torch.randn(2, 5, 4, 3)
    assert (ALONE.rank, ALONE.size, ALONE.cfg_rank, ALONE.cfg_size) == (0, 1, 0, 1)
    assert ALONE.to_heads(x, layout) is x
    assert ALONE.to_tokens(x, layout) is x
    assert ALONE.gather_tokens(x, 5) is x
    assert ALONE.sum(x) is x
    assert ALONE.from_cond(x) is x
    with pytest.raises(AssertionError, match="one branch each"):
        ALONE.gather_branches(x)


def test_pads_are_zeros_at_the_end_and_rows_that_suffice_are_not_copied() -> None:
    x_BSHD = torch.ones(2, 3, 4, 5, dtype=torch.bfloat16)
    padded_BSHD = pad_rows(x_BSHD, 5)
    assert padded_BSHD.shape == (2, 5, 4, 5)
    assert padded_BSHD.dtype == torch.bfloat16
    assert torch.equal(padded_BSHD[:, :3], x_BSHD)
    assert not padded_BSHD[:, 3:].any()
    assert pad_rows(x_BSHD, 3) is x_BSHD
