"""Draws masks and matches over frames.

Frames are uint8, (frames, height, width, 3), RGB. A mask is bool, True where the character is, in
pixels or in tokens: (latent frames, rows, columns). Knows no model, no story and no run directory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bachvid.engine.results import Foreground, Frames
from bachvid.errors import LayoutError
from bachvid.output.pixels import enlarge, enlargement, to_pixels
from bachvid.output.sheets import TILE_HEIGHT, SheetRow

_TINT = (255, 45, 120)
_CORNERS = np.array(  # colours of an identity position: top left, top right, bottom left, right
    [[[236, 64, 122], [255, 213, 79]], [[63, 81, 235], [38, 198, 120]]], dtype=np.float32
)


def upsample_foreground(
    foreground: Foreground, *, temporal_ratio: int, height: int, width: int
) -> Foreground:
    """Return a token mask spread over pixels, in space and in time.

    Latent frame 0 covers pixel frame 0, every later one covers `temporal_ratio` pixel frames.
    Raises LayoutError if the pixels are no multiple of the tokens.
    """
    _, rows, columns = foreground.shape
    if height % rows or width % columns:
        raise LayoutError(
            f"a mask of {rows}x{columns} tokens does not cover {height}x{width} pixels evenly"
        )
    in_time = np.concatenate([foreground[:1], foreground[1:].repeat(temporal_ratio, axis=0)])
    return in_time.repeat(height // rows, axis=1).repeat(width // columns, axis=2)


def overlay_mask(frames: Frames, foreground: Foreground) -> Frames:
    """Return frames with the foreground tinted, the rest greyed and the border drawn in between.

    `foreground` is in pixels.
    """
    pixels = frames.astype(np.float32)
    grey = pixels.mean(axis=-1, keepdims=True)
    rest = 0.55 * pixels + 0.45 * grey
    tinted = 0.72 * pixels + 0.28 * np.array(_TINT, dtype=np.float32)
    blended = np.where(foreground[..., None], tinted, rest)
    width = max(1, frames.shape[1] // 160)
    blended[_border(foreground, width)] = _TINT
    return to_pixels(blended)


def identity_colours(foreground: Foreground) -> NDArray[np.uint8]:
    """Return a colour for every identity token, by its place in the figure.

    `foreground` is in tokens, the result uint8, (latent frames, rows, columns, 3). Colours are
    mixed between the four corners of the figure's bounding box in that frame, so that a part of
    the body has about the same colour in every frame.
    """
    num_frames, rows, columns = foreground.shape
    colours = np.zeros((num_frames, rows, columns, 3), dtype=np.float32)
    for index, mask in enumerate(foreground):
        down = _place_within(mask.any(axis=1))[:, None, None]
        right = _place_within(mask.any(axis=0))[None, :, None]
        top = (1 - right) * _CORNERS[0, 0] + right * _CORNERS[0, 1]
        bottom = (1 - right) * _CORNERS[1, 0] + right * _CORNERS[1, 1]
        colours[index] = (1 - down) * top + down * bottom
    return to_pixels(colours)


def overlay_tokens(frames: Frames, colours: NDArray[np.uint8], shown: Foreground) -> Frames:
    """Return frames, one for each latent frame, with the tokens of `shown` in their `colours`."""
    _, rows, columns = shown.shape
    down, right = frames.shape[1] // rows, frames.shape[2] // columns
    paint = colours.repeat(down, axis=1).repeat(right, axis=2).astype(np.float32)
    where = shown.repeat(down, axis=1).repeat(right, axis=2)[..., None]
    grey = frames.mean(axis=-1, keepdims=True)
    painted = np.where(where, 0.25 * grey + 0.75 * paint, 0.35 * frames + 0.45 * grey + 40)
    return to_pixels(painted)


def match_rows(
    *,
    identity_frames: Frames,
    frame_frames: Frames,
    identity_foreground: Foreground,
    match_index: NDArray[np.int64],
    matched: Foreground,
    temporal_ratio: int,
    caption: str,
) -> list[SheetRow]:
    """Return two rows of tiles that show which identity token every matched frame token took.

    `match_index` holds, for every frame token in raster order, the identity token (raster
    order too); `matched` is True for the tokens whose match was used. Both rows show the first
    pixel frame of every latent frame: equal colours are the same place of the figure.
    """
    shape = identity_foreground.shape
    first = [0, *range(1, identity_frames.shape[0], temporal_ratio)][: shape[0]]
    _, height, width, _ = identity_frames.shape
    factor = enlargement(height, width, TILE_HEIGHT)
    colours = identity_colours(identity_foreground)
    taken = colours.reshape(-1, 3)[match_index].reshape(*shape, 3)
    identity = overlay_tokens(enlarge(identity_frames[first], factor), colours, identity_foreground)
    frame = overlay_tokens(enlarge(frame_frames[first], factor), taken, matched)
    share = matched.mean()
    return [
        SheetRow("identity", "colour is the place in the figure", identity),
        SheetRow("frame video", f"{caption}: {share:.0%} of the tokens matched", frame),
    ]


def _border(foreground: Foreground, width: int) -> Foreground:
    """Return the foreground pixels within `width` of the background, in each frame."""
    inner = foreground.copy()
    for _ in range(width):
        padded = np.pad(inner, ((0, 0), (1, 1), (1, 1)), mode="edge")
        inner = (
            padded[:, 1:-1, 1:-1]
            & padded[:, :-2, 1:-1]
            & padded[:, 2:, 1:-1]
            & padded[:, 1:-1, :-2]
            & padded[:, 1:-1, 2:]
        )
    return foreground & ~inner


def _place_within(occupied: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the position of every index in the occupied range, clipped to 0..1."""
    used = np.flatnonzero(occupied)
    if not used.size:
        return np.zeros(occupied.size, dtype=np.float32)
    span = max(1, used[-1] - used[0])
    places: NDArray[np.float32] = ((np.arange(occupied.size) - used[0]) / span).astype(np.float32)
    return places.clip(0, 1)
