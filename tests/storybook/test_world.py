"""The procedural world: deterministic, and its truth is true."""

from __future__ import annotations

import numpy as np
import pytest

from bachvid.storybook.world import (
    ACTIONS,
    ATTRIBUTES,
    BACKGROUNDS,
    CHARACTERS,
    draw_attributes,
    render_clip,
)


def test_a_clip_depends_on_its_arguments_only() -> None:
    first = render_clip(3, 1, 2, 3)
    render_clip(4, 0, 0, 0)
    again = render_clip(3, 1, 2, 3)
    np.testing.assert_array_equal(first.frames, again.frames)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert first.attributes == again.attributes
    assert (first.frames != render_clip(5, 1, 2, 3).frames).any()


@pytest.mark.parametrize("background", range(len(BACKGROUNDS)))
@pytest.mark.parametrize("character", range(len(CHARACTERS)))
def test_every_character_stands_out_of_every_background(background: int, character: int) -> None:
    clip = render_clip(0, background, character, 0, difficulty="easy")
    share = clip.mask.mean()
    assert 0.08 < share < 0.35
    around = clip.frames[~clip.mask].mean(0)
    assert np.abs(clip.frames[clip.mask] - around).max(-1).mean() > 50


def test_the_rest_pose_is_known_where_the_mask_is() -> None:
    for action in range(len(ACTIONS)):
        clip = render_clip(1, 0, 0, action)
        np.testing.assert_array_equal(np.isfinite(clip.rest).all(-1), clip.mask)


def test_pixels_of_one_rest_pose_point_have_one_colour() -> None:
    """Correspondences are true: the same point of a character looks the same in every pose."""
    standing, jumping = (render_clip(9, 2, 3, action) for action in (0, ACTIONS.index("jumps")))
    # The same looks in both: only clips of one seed and the same words share their attributes.
    attributes = draw_attributes(np.random.default_rng((9, 2, 3, 0)))
    assert standing.attributes == attributes
    one, other = render_clip(9, 2, 3, 0).frames[0], standing.frames[4]
    np.testing.assert_array_equal(one[standing.mask[0]], other[standing.mask[4]])
    # Within a jump, a body point keeps its colour while the body moves.
    rest, frames = jumping.rest, jumping.frames.astype(int)
    ground = rest[0][jumping.mask[0]]
    colours = frames[0][jumping.mask[0]]
    differences = []
    for point, colour in zip(rest[2][jumping.mask[2]], frames[2][jumping.mask[2]], strict=True):
        nearest = np.abs(ground - point).sum(-1).argmin()
        differences.append(np.abs(colours[nearest] - colour).max())
    assert np.mean(np.asarray(differences) < 40) > 0.75


@pytest.mark.parametrize("action", [1, 2])
def test_a_walk_crosses_a_third_of_the_frame(action: int) -> None:
    clip = render_clip(0, 3, 1, action)
    columns = [np.flatnonzero(mask.any(0)).mean() for mask in clip.mask]
    crossed = (columns[-1] - columns[0]) * (1 if ACTIONS[action].endswith("right") else -1)
    assert crossed > 0.25 * clip.mask.shape[-1]


def test_the_background_stands_still() -> None:
    clip = render_clip(2, 4, 1, ACTIONS.index("waves an arm"))
    still = ~clip.mask.any(0)
    # Edges of the figure are blended into the background: look away from them.
    for shift in (-1, 1):
        still &= ~np.roll(clip.mask, shift, 1).any(0) & ~np.roll(clip.mask, shift, 2).any(0)
    for frame in clip.frames[1:]:
        np.testing.assert_array_equal(frame[still], clip.frames[0][still])


def test_every_attribute_takes_every_value() -> None:
    drawn = [draw_attributes(np.random.default_rng((seed, 0, 0, 0))) for seed in range(200)]
    for name, values in ATTRIBUTES.items():
        assert {row[name] for row in drawn} == set(range(len(values)))
