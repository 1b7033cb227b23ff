from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bachvid.errors import LayoutError
from bachvid.methods.ops.matching import match_tokens, match_within_foreground


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_match(frame: list[Tensor], identity: list[Tensor]) -> tuple[list[int], list[float]]:
    """Cosine per layer, averaged, then the first maximum: loops and float64."""
    indices, scores = [], []
    for q in range(len(frame[0])):
        best, best_score = -1, -math.inf
        for m in range(len(identity[0])):
            total = 0.0
            for frame_QC, identity_MC in zip(frame, identity, strict=True):
                a, b = frame_QC[q].double(), identity_MC[m].double()
                total += float(a @ b / (a.norm() * b.norm()))
            if total / len(frame) > best_score:
                best, best_score = m, total / len(frame)
        indices.append(best)
        scores.append(best_score)
    return indices, scores


@pytest.mark.parametrize("seed", range(4))
def test_match_equals_its_definition(seed: int) -> None:
    frame = [normal(13, 8, seed=seed), 100 * normal(13, 6, seed=seed + 10)]
    identity = [normal(17, 8, seed=seed + 20), normal(17, 6, seed=seed + 30)]
    indices, scores = reference_match(frame, identity)
    match = match_tokens(frame, identity)
    assert match.index_Q.tolist() == indices
    assert match.index_Q.dtype == torch.int64
    torch.testing.assert_close(match.score_Q.double(), torch.tensor(scores).double())


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_the_chunk_size_does_not_change_the_match(chunk: int) -> None:
    frame, identity = [normal(13, 8, seed=1)], [normal(17, 8, seed=2)]
    expected, actual = match_tokens(frame, identity), match_tokens(frame, identity, chunk=chunk)
    assert torch.equal(actual.index_Q, expected.index_Q)
    torch.testing.assert_close(actual.score_Q, expected.score_Q)


def test_a_permutation_is_recovered_whatever_the_norms() -> None:
    identity_MC = normal(40, 16, seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    norms = torch.rand(40, 1, generator=torch.Generator().manual_seed(5)) * 100 + 0.01
    match = match_tokens([identity_MC[order] * norms], [identity_MC])
    assert torch.equal(match.index_Q, order)
    torch.testing.assert_close(match.score_Q, torch.ones(40))


def test_of_equal_tokens_the_lowest_index_wins() -> None:
    identity_MC = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [0.0, 2.0]])
    match = match_tokens([torch.tensor([[8.0, 0.0], [0.0, 1.0]])], [identity_MC])
    assert match.index_Q.tolist() == [1, 0]


def test_bfloat16_features_match_as_their_fp32_values_do() -> None:
    shared = 10 * normal(1, 32, seed=6)  # a common direction: all cosines lie close together
    frame = (normal(60, 32, seed=7) + shared).bfloat16()
    identity = (normal(60, 32, seed=8) + shared).bfloat16()
    indices, _ = reference_match([frame], [identity])
    assert match_tokens([frame], [identity]).index_Q.tolist() == indices


def test_no_tokens_give_no_match() -> None:
    match = match_tokens([torch.empty(0, 8)], [normal(5, 8, seed=0)])
    assert match.index_Q.shape == match.score_Q.shape == (0,)
    assert match.index_Q.dtype == torch.int64


@pytest.mark.parametrize(
    ("frame", "identity"),
    [
        ([torch.ones(2, 8)], [torch.ones(3, 6)]),
        ([torch.ones(2, 8)], [torch.ones(3, 8)] * 2),
        ([], []),
    ],
)
def test_features_of_other_layers_or_models_are_refused(
    frame: list[Tensor], identity: list[Tensor]
) -> None:
    with pytest.raises(LayoutError, match="need the same match layers of the same model"):
        match_tokens(frame, identity)


def test_a_match_within_the_foreground_equals_its_definition() -> None:
    frame, identity = [normal(9, 8, seed=1)], [normal(17, 8, seed=2)]
    mask_M = torch.zeros(17, dtype=torch.bool)
    mask_M[[3, 4, 8, 11, 16]] = True
    rows = mask_M.nonzero().flatten()
    centred = [
        [frame[0].double() - frame[0].double().mean(0)],
        [identity[0][rows].double() - identity[0][rows].double().mean(0)],
    ]
    indices, scores = reference_match(*centred)
    match = match_within_foreground(frame, identity, mask_M)
    assert match.index_Q.tolist() == rows[indices].tolist()
    torch.testing.assert_close(match.score_Q.double(), torch.tensor(scores).double())


def test_what_all_of_a_character_shares_does_not_decide_a_match_within_the_foreground() -> None:
    identity = [normal(12, 8, seed=3)]
    shared = 1000 * normal(1, 8, seed=4)
    mask_M = torch.ones(12, dtype=torch.bool)
    match = match_within_foreground([identity[0] + shared], identity, mask_M)
    assert match.index_Q.tolist() == list(range(12))


def test_without_a_foreground_to_match_every_score_is_the_lowest() -> None:
    match = match_within_foreground(
        [normal(4, 8, seed=5)], [normal(6, 8, seed=6)], torch.zeros(6, dtype=torch.bool)
    )
    assert match.index_Q.tolist() == [0, 0, 0, 0]
    assert match.score_Q.tolist() == [-1.0] * 4
