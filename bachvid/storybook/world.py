"""The procedural world that the storybook model is trained on and measured against.

A clip is drawn from (seed, background, character, action): the prompt fixes the three words, the
seed draws everything that a prompt leaves open (hat, pattern, skin, place, scale, scenery). Every
clip carries its truth: the foreground mask, and for each character pixel the point of the rest pose
that it shows, so that true correspondences between any two clips of one character are known.

Legend: F frames, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bachvid.storybook.figure import (
    ACTIONS,
    ATTRIBUTES,
    CHARACTERS,
    Array,
    Part,
    build_figure,
    pose_figure,
)
from bachvid.storybook.scenery import BACKGROUNDS, paint_background

Difficulty = Literal["easy", "varied"]

_GROUND = 0.93  # where the feet stand, in frame sizes from the top
_ACCENTS = (
    (1.0, 1.0, 1.0),
    (0.06, 0.06, 0.10),
)  # of patterns: the first unless the garment is light


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip with its truth.

    frames uint8 [F, H, W, 3]; mask bool [F, H, W]; rest float32 [F, H, W, 2] in figure heights,
    NaN outside the character; attributes maps each name of ATTRIBUTES to an index of its values.
    """

    frames: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    rest: Array
    attributes: Mapping[str, int]


def compose_caption(background: int, character: int, action: int) -> str:
    """Return the prompt of a clip."""
    return f"{BACKGROUNDS[background]}, {CHARACTERS[character]}, {ACTIONS[action]}"


def draw_attributes(rng: np.random.Generator) -> dict[str, int]:
    """Draw what the prompt leaves open: the first numbers of a clip's generator."""
    return {name: int(rng.integers(len(values))) for name, values in ATTRIBUTES.items()}


def render_clip(
    seed: int,
    background: int,
    character: int,
    action: int,
    *,
    size: int = 64,
    num_frames: int = 9,
    difficulty: Difficulty = "varied",
) -> Clip:
    """Draw the clip of `seed` for these indices of BACKGROUNDS, CHARACTERS and ACTIONS.

    `easy` puts a large figure in the middle; `varied` draws its place and scale too.
    """
    rng = np.random.default_rng((seed, background, character, action))
    attributes = draw_attributes(rng)
    frames = np.repeat(paint_background(background, rng, size)[None], num_frames, axis=0)
    scale, shift = 0.68, 0.0
    if difficulty == "varied":
        scale, shift = float(rng.uniform(0.58, 0.69)), float(rng.uniform(-0.16, 0.16))
    pose = pose_figure(action, num_frames)
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size
    middle = 0.5 + shift + 0.19 * pose.travel
    feet = _GROUND - 0.20 * pose.lift
    # Each pixel centre in figure heights, [F, W] and [F, H].
    x = ((centre[None, :] - middle[:, None]) / scale).astype(np.float32)
    y = ((np.broadcast_to(feet, middle.shape)[:, None] - centre[None, :]) / scale).astype(
        np.float32
    )
    mask = np.zeros(frames.shape[:3], bool)
    rest = np.full((*frames.shape[:3], 2), np.nan, np.float32)
    for part in build_figure(character, attributes, pose):
        _draw(part, x, y, 1.0 / (size * scale), frames, mask, rest)
    return Clip((frames * 255 + 0.5).astype(np.uint8), mask, rest, attributes)


def _draw(
    part: Part,
    x: Array,
    y: Array,
    pixel: float,
    frames: Array,
    mask: NDArray[np.bool_],
    rest: Array,
) -> None:
    """Draw a part in place: its colour, its mask and the rest pose of its pixels."""
    reach = max(part.radius) + pixel
    ends = np.stack([part.start, part.end])  # [2, F, 2]
    low, high = ends.min(0)[:, None] - reach, ends.max(0)[:, None] + reach  # [F, 1, 2]
    columns = _where((x > low[..., 0]) & (x < high[..., 0]))
    rows = _where((y > low[..., 1]) & (y < high[..., 1]))
    window = (slice(None), rows, columns)
    frames, mask, rest = frames[window], mask[window], rest[window]  # views: what is drawn on
    axis = part.end - part.start  # [F, 2]
    length = np.maximum(np.hypot(axis[:, 0], axis[:, 1]), 1e-4)[:, None, None]
    along_x, along_y = (axis[:, i, None, None] / length for i in (0, 1))
    dx = (x[:, columns] - part.start[:, :1])[:, None, :]
    dy = (y[:, rows] - part.start[:, 1:])[:, :, None]
    along = dx * along_x + dy * along_y  # from the start, in figure heights
    across = dx * along_y - dy * along_x
    inside = np.clip(along, 0, length)
    radius = part.radius[0] + (part.radius[1] - part.radius[0]) * inside / length
    if part.flat:
        distance = np.maximum(np.abs(across) - radius, np.abs(along - length / 2) - length / 2)
    else:
        distance = np.hypot(along - inside, across) - radius
    alpha = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
    frames += alpha * (_garment(part, along / length, across) - frames)
    covered = alpha[..., 0] > 0.5
    mask |= covered
    start, end = np.asarray(part.rest_start), np.asarray(part.rest_end)
    rest_length = np.hypot(*(end - start))
    unit = (end - start) / rest_length
    normal = np.asarray([unit[1], -unit[0]])
    place = start + (along / length * rest_length)[..., None] * unit + across[..., None] * normal
    rest[covered] = place[covered]


def _where(hit: NDArray[np.bool_]) -> slice:
    """Return the part of the second axis that is hit in any row."""
    found = np.flatnonzero(hit.any(0))
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def _garment(part: Part, along: Array, across: Array) -> Array:
    """Return a part's colour at each pixel: [F, H, W, 3], or [3] where it is plain."""
    colour = np.asarray(part.colour, np.float32)
    name = ATTRIBUTES["pattern"][part.pattern]
    if name == "plain":
        return colour
    accent = np.asarray(_ACCENTS[int(colour.mean() > 0.62)], np.float32)
    # Two broad stripes across the garment, or one broad sash down over it.
    on = np.abs((along * 2.0) % 1.0 - 0.5) < 0.25 if name == "stripes" else np.abs(across) < 0.055
    return np.where(on[..., None], accent, colour).astype(np.float32)


__all__ = [
    "ACTIONS",
    "ATTRIBUTES",
    "BACKGROUNDS",
    "CHARACTERS",
    "Clip",
    "Difficulty",
    "compose_caption",
    "draw_attributes",
    "render_clip",
]
