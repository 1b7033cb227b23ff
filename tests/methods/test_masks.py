from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from bachvid.errors import WorkerError
from bachvid.layout.tokens import TokenLayout
from bachvid.methods.ops.masks import MaskRecovery, extract_foreground_mask, smooth_mask, text_mass

LAYOUT = TokenLayout(text_tokens=7, latent_frames=2, grid_height=5, grid_width=6)
BACKGROUND, CHARACTER = (0, 1, 2), (4, 5)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_mass(query_NHD: Tensor, key_KHD: Tensor, segments: list[tuple[int, ...]]) -> Tensor:
    """The definition, in Python loops and float64."""
    num_queries, num_heads, width = query_NHD.shape
    mass_NG = torch.zeros(num_queries, len(segments), dtype=torch.float64)
    for i in range(num_queries):
        for h in range(num_heads):
            query_D = query_NHD[i, h].double()
            weights = [
                math.exp(float(query_D @ key_KHD[k, h].double()) / math.sqrt(width))
                for k in range(len(key_KHD))
            ]
            for g, segment in enumerate(segments):
                share = sum(weights[k] for k in segment) / sum(weights) / len(segment)
                mass_NG[i, g] += share / num_heads
    return mass_NG


def reference_smoothing(mask_N: Tensor, layout: TokenLayout) -> Tensor:
    """Erode by 3x3 and dilate by 5x5, pixel by pixel; outside the frame nothing counts."""

    def window(grid_HW: Tensor, i: int, j: int, reach: int) -> Tensor:
        return grid_HW[max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]

    result = torch.zeros(layout.grid, dtype=torch.bool)
    for frame, mask_HW in enumerate(mask_N.view(layout.grid)):
        eroded_HW = torch.zeros_like(mask_HW)
        for i in range(layout.grid_height):
            for j in range(layout.grid_width):
                eroded_HW[i, j] = window(mask_HW, i, j, 1).all()
        for i in range(layout.grid_height):
            for j in range(layout.grid_width):
                result[frame, i, j] = window(eroded_HW, i, j, 2).any()
    return result.flatten()


@pytest.mark.parametrize("seed", range(4))
def test_text_mass_equals_its_definition(seed: int) -> None:
    query_NHD, key_KHD = normal(20, 3, 8, seed=seed) * 2, normal(27, 3, 8, seed=seed + 50) * 2
    segments = [BACKGROUND, CHARACTER]
    actual = text_mass(query_NHD, key_KHD, segments)
    assert actual.dtype == torch.float32
    expected = reference_mass(query_NHD, key_KHD, segments)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("chunk", [1, 7, 19, 1000])
def test_the_chunk_size_does_not_change_the_text_mass(chunk: int) -> None:
    query_NHD, key_KHD = normal(20, 3, 8, seed=1), normal(27, 3, 8, seed=2)
    expected = text_mass(query_NHD, key_KHD, [BACKGROUND, CHARACTER], chunk=20)
    actual = text_mass(query_NHD, key_KHD, [BACKGROUND, CHARACTER], chunk=chunk)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_text_mass_survives_large_logits_in_half_precision() -> None:
    query_NHD, key_KHD = normal(5, 2, 16, seed=3) * 60, normal(9, 2, 16, seed=4) * 60
    query_NHD, key_KHD = query_NHD.half(), key_KHD.half()
    mass_NG = text_mass(query_NHD, key_KHD, [tuple(range(9))])
    torch.testing.assert_close(mass_NG, torch.full((5, 1), 1 / 9), rtol=1e-5, atol=0)


def test_the_mask_compares_sums_over_layers_and_ties_are_foreground() -> None:
    layout = TokenLayout(1, 1, 1, 4)
    first = torch.tensor([[0.5, 0.1], [0.1, 0.5], [0.25, 0.25], [0.5, 0.0]])
    second = torch.tensor([[0.1, 0.4], [0.1, 0.0], [0.25, 0.25], [0.25, 0.0]])
    mask = extract_foreground_mask(
        [first, second], layout, step=3, morphology=False, on_empty="fail"
    )
    assert mask.mask_N.tolist() == [False, True, True, False]
    torch.testing.assert_close(mask.score_N, torch.tensor([-0.1, 0.3, 0.0, -0.75]))
    assert mask.recovery is None


def masses_of(score_N: Tensor) -> list[Tensor]:
    """Masses whose character less background is `score_N`."""
    return [torch.stack([torch.ones_like(score_N), 1 + score_N], dim=-1)]


@pytest.mark.parametrize(("shift", "found"), [(-10.0, "empty"), (10.0, "full")])
def test_an_empty_or_full_mask_is_taken_from_the_highest_scores(
    shift: float, found: Literal["empty", "full"]
) -> None:
    score_N = torch.arange(60.0)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    masses = masses_of(score_N / 64 + shift)  # exact in fp32
    mask = extract_foreground_mask(masses, LAYOUT, step=3, morphology=True, on_empty="adapt")
    assert mask.mask_N.tolist() == (score_N >= 48).tolist()
    assert mask.recovery is not None
    assert mask.recovery == MaskRecovery(3, found, "quantile", mask.recovery.threshold)
    assert mask.recovery.threshold == pytest.approx(0.8 * 59 / 64 + shift)


@pytest.mark.parametrize(("score", "found"), [(-1.0, "empty"), (1.0, "full"), (math.nan, "empty")])
def test_scores_that_say_nothing_leave_only_background(
    score: float, found: Literal["empty", "full"]
) -> None:
    masses = masses_of(torch.full((60,), score))
    mask = extract_foreground_mask(masses, LAYOUT, step=2, morphology=False, on_empty="adapt")
    assert not mask.mask_N.any()
    assert mask.recovery == MaskRecovery(2, found, "background_only", None)


@pytest.mark.parametrize(("score", "found"), [(-1.0, "empty"), (1.0, "full")])
def test_an_empty_or_full_mask_fails_if_so_configured(
    score: float, found: Literal["empty", "full"]
) -> None:
    masses = masses_of(torch.full((60,), score))
    with pytest.raises(WorkerError) as error:
        extract_foreground_mask(masses, LAYOUT, step=2, morphology=False, on_empty="fail")
    assert str(error.value) == (
        f"the foreground mask at step 2 is {found}: a story needs a character and a background; "
        f"reword the prompt, or set method.on_empty_mask=adapt"
    )


def test_a_mask_that_erosion_empties_is_recovered() -> None:
    score_N = torch.full((60,), -1.0)
    score_N[[8, 40]] = 0.5  # two single tokens
    mask = extract_foreground_mask(
        masses_of(score_N), LAYOUT, step=0, morphology=True, on_empty="adapt"
    )
    assert mask.recovery is not None
    assert mask.recovery.found == "empty"


@pytest.mark.parametrize("seed", range(6))
def test_morphology_equals_a_plain_loop(seed: int) -> None:
    layout = TokenLayout(0, 3, 9, 11)
    mask_N = torch.rand(layout.video_tokens, generator=torch.Generator().manual_seed(seed)) < 0.85
    assert torch.equal(smooth_mask(mask_N, layout), reference_smoothing(mask_N, layout))


def test_morphology_keeps_what_touches_the_border() -> None:
    layout = TokenLayout(0, 1, 6, 6)
    mask_HW = torch.zeros(6, 6, dtype=torch.bool)
    mask_HW[:2, :2] = True
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[:3, :3] = True
    assert torch.equal(smooth_mask(mask_HW.flatten(), layout), expected.flatten())
