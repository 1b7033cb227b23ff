from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bachvid.errors import LayoutError
from bachvid.kv.cache import Shard
from bachvid.layout.records import AttentionSite
from bachvid.layout.tokens import TokenLayout
from bachvid.methods.ops.injection import inject_identity_kv, select_injected_tokens
from bachvid.methods.ops.matching import TokenMatch

LAYOUT = TokenLayout(text_tokens=3, latent_frames=2, grid_height=2, grid_width=3)
FRAME_MASK = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
IDENTITY_MASK = torch.tensor([0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.bool)
# tokens 0, 1, 4, 8: matched; matched to background; too different; matched, exactly at the bound
MATCH = TokenMatch(torch.tensor([2, 3, 1, 2]), torch.tensor([0.9, 0.9, 0.4, 0.5]))


def random_shard(seed: int) -> Shard:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(1, 12, 2, 4, generator=generator) for _ in range(2))
    return Shard(AttentionSite(0, 0, "cond"), {"key": key, "value": value})


def test_foreground_needs_a_match_inside_the_identity_foreground() -> None:
    tokens = select_injected_tokens(FRAME_MASK, IDENTITY_MASK, MATCH, LAYOUT, threshold=0.5)
    assert tokens.foreground_positions_Q.tolist() == [0, 8]
    assert tokens.foreground_rows_Q.tolist() == [3, 11]
    assert tokens.identity_index_Q.tolist() == [2, 2]


def test_background_is_in_neither_mask() -> None:
    tokens = select_injected_tokens(FRAME_MASK, IDENTITY_MASK, MATCH, LAYOUT, threshold=0.5)
    assert tokens.background_positions_Q.tolist() == [3, 5, 6, 9, 10, 11]
    assert tokens.background_rows_Q.tolist() == [6, 8, 9, 12, 13, 14]


def test_without_a_match_only_background_is_chosen() -> None:
    tokens = select_injected_tokens(FRAME_MASK, IDENTITY_MASK, None, LAYOUT, threshold=0.5)
    assert tokens.foreground_rows_Q.tolist() == tokens.identity_index_Q.tolist() == []
    assert tokens.background_positions_Q.tolist() == [3, 5, 6, 9, 10, 11]


@pytest.mark.parametrize("seed", range(8))
def test_selection_and_injection_equal_a_plain_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    frame, identity = torch.rand(2, 12, generator=generator) < 0.5
    count = int(frame.sum())
    match = TokenMatch(
        torch.randint(0, 12, (count,), generator=generator), torch.rand(count, generator=generator)
    )
    shard = random_shard(seed)
    tokens = select_injected_tokens(frame, identity, match, LAYOUT, threshold=0.4)
    actual = []
    for group in inject_identity_kv(shard, tokens):
        rows, positions = group.query_rows_Q.tolist(), group.positions_M.tolist()
        for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
            actual.append((row, position, group.key_BMHD[0, i], group.value_BMHD[0, i]))

    expected: list[tuple[int, int, Tensor, Tensor]] = []
    nth = 0
    for j in range(12):
        if frame[j]:
            source = int(match.index_Q[nth])
            if identity[source] and float(match.score_Q[nth]) >= 0.4:
                expected.append(
                    (3 + j, j, shard.pieces["key"][0, source], shard.pieces["value"][0, source])
                )
            nth += 1
    for j in range(12):
        if not frame[j] and not identity[j]:
            expected.append((3 + j, j, shard.pieces["key"][0, j], shard.pieces["value"][0, j]))
    assert [entry[:2] for entry in actual] == [entry[:2] for entry in expected]
    for (_, _, key, value), (_, _, expected_key, expected_value) in zip(
        actual, expected, strict=True
    ):
        assert torch.equal(key, expected_key)
        assert torch.equal(value, expected_value)


def test_text_rows_are_in_no_group_and_no_row_is_in_two() -> None:
    tokens = select_injected_tokens(FRAME_MASK, IDENTITY_MASK, MATCH, LAYOUT, threshold=-1.0)
    groups = inject_identity_kv(random_shard(0), tokens)
    rows = torch.cat([group.query_rows_Q for group in groups]).tolist()
    assert min(rows) >= LAYOUT.text_tokens
    assert len(rows) == len(set(rows))


def test_empty_sets_give_no_group() -> None:
    nowhere, everywhere = torch.zeros(12, dtype=torch.bool), torch.ones(12, dtype=torch.bool)
    no_match = TokenMatch(torch.empty(0, dtype=torch.int64), torch.empty(0))
    only_background = select_injected_tokens(nowhere, nowhere, no_match, LAYOUT, threshold=0.5)
    (group,) = inject_identity_kv(random_shard(0), only_background)
    assert group.query_rows_Q.tolist() == list(range(3, 15))
    neither = select_injected_tokens(nowhere, everywhere, no_match, LAYOUT, threshold=0.5)
    assert inject_identity_kv(random_shard(0), neither) == []


def test_masks_and_matches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayoutError, match="masks of 12 and 6 tokens for a video of 12"):
        select_injected_tokens(FRAME_MASK, IDENTITY_MASK[:6], MATCH, LAYOUT, threshold=0.5)
    short = TokenMatch(MATCH.index_Q[:3], MATCH.score_Q[:3])
    with pytest.raises(LayoutError, match="a match of 3 tokens for 4 foreground tokens"):
        select_injected_tokens(FRAME_MASK, IDENTITY_MASK, short, LAYOUT, threshold=0.5)
