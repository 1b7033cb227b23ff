"""Frames to files: mp4, contact sheets, mask and match overlays.

Knows arrays and pixels only: no model, no story, no run directory. Shapes: F frames, H rows and
W columns of pixels; tokens have a grid of their own, (latent frames, rows, columns).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from bachvid.errors import LayoutError

Frames = NDArray[np.uint8]
"""Pixels, uint8, (frames, height, width, 3), RGB."""

Foreground = NDArray[np.bool_]
"""True where the character is: (frames, height, width), in pixels or in tokens."""

Metadata = Mapping[str, str | int | float]

_PAPER = (250, 249, 246)
_INK = (34, 34, 38)
_FADED = (116, 116, 122)
_TINT = (255, 45, 120)
_CORNERS = np.array(  # colours of an identity position: top left, top right, bottom left, right
    [[[236, 64, 122], [255, 213, 79]], [[63, 81, 235], [38, 198, 120]]], dtype=np.float32
)
_MARGIN = 16
_GAP = 6
_CAPTION_WIDTH = 190
_TILE_HEIGHT = 144
_MAX_COLUMNS = 7
# swscale's quick default darkens every colour by one to three levels.
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def enlargement(height: int, width: int, min_height: int) -> int:
    """Find the factor, 1 or an even one, that reaches `min_height` and makes both sides even.

    H.264 with 4:2:0 chroma stores one colour for 2x2 pixels: sides must be even, and with an
    even factor no colour runs into the next pixel.
    """
    factor = -(-min_height // height)
    if factor <= 1 and height % 2 == 0 and width % 2 == 0:
        return 1
    return factor + factor % 2


def enlarge(frames: Frames, factor: int) -> Frames:
    """Repeat every pixel `factor` times in both directions (nearest neighbour)."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def write_mp4(frames: Frames, path: Path, *, fps: int, crf: int, metadata: Metadata) -> None:
    """Write H.264 with 4:2:0 chroma, playable while it downloads, with `metadata` as comment.

    The bytes of the file are not reproducible (x264 splits work by threads): hash `frames`.
    Raises LayoutError if a side of the frames is odd.
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise LayoutError(f"cannot encode {width}x{height}: H.264 needs even sides; enlarge by 2")
    options = {"movflags": "faststart"}
    with av.open(str(path), "w", format="mp4", container_options=options) as container:
        container.metadata["comment"] = json.dumps(metadata, sort_keys=True)
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Untagged files are shown as BT.601 by one player and as BT.709 by another.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for pixels in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = rgb.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_EXACT,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_metadata(path: Path) -> dict[str, str | int | float]:
    """Return what `write_mp4` was given as metadata, or nothing if the file carries none."""
    with av.open(str(path)) as container:
        comment = container.metadata.get("comment")
    return dict(json.loads(comment)) if comment else {}


def read_mp4(path: Path, *, shrink: int = 1) -> Frames:
    """Decode an mp4 and average every `shrink` x `shrink` pixels: lossy, near what was written."""
    with av.open(str(path)) as container:
        decoded = [
            frame.reformat(
                format="rgb24", src_colorspace=Colorspace.ITU709, interpolation=_EXACT
            ).to_ndarray()
            for frame in container.decode(video=0)
        ]
    frames = np.stack(decoded)
    num_frames, height, width, _ = frames.shape
    if height % shrink or width % shrink:
        raise LayoutError(f"{path} is {width}x{height}: it is not enlarged by {shrink}")
    blocks = frames.reshape(num_frames, height // shrink, shrink, width // shrink, shrink, 3)
    return _to_pixels(blocks.mean(axis=(2, 4)))


def upsample_foreground(
    foreground: Foreground, *, temporal_ratio: int, height: int, width: int
) -> Foreground:
    """Spread a token mask over pixels, in space and in time.

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
    """Tint the foreground, grey the rest a little and draw the border between them."""
    pixels = frames.astype(np.float32)
    grey = pixels.mean(axis=-1, keepdims=True)
    rest = 0.55 * pixels + 0.45 * grey
    tinted = 0.72 * pixels + 0.28 * np.array(_TINT, dtype=np.float32)
    blended = np.where(foreground[..., None], tinted, rest)
    width = max(1, frames.shape[1] // 160)
    blended[_border(foreground, width)] = _TINT
    return _to_pixels(blended)


def identity_colours(foreground: Foreground) -> NDArray[np.uint8]:
    """Give every identity token a colour by its place in the figure, uint8, (F, H, W, 3).

    Colours are mixed between the four corners of the figure's bounding box in that frame, so
    that a part of the body has about the same colour in every frame.
    """
    num_frames, rows, columns = foreground.shape
    colours = np.zeros((num_frames, rows, columns, 3), dtype=np.float32)
    for index, mask in enumerate(foreground):
        down = _place_within(mask.any(axis=1))[:, None, None]
        right = _place_within(mask.any(axis=0))[None, :, None]
        top = (1 - right) * _CORNERS[0, 0] + right * _CORNERS[0, 1]
        bottom = (1 - right) * _CORNERS[1, 0] + right * _CORNERS[1, 1]
        colours[index] = (1 - down) * top + down * bottom
    return _to_pixels(colours)


def overlay_tokens(frames: Frames, colours: NDArray[np.uint8], shown: Foreground) -> Frames:
    """Paint the tokens of `shown` with their colours over one frame per latent frame."""
    _, rows, columns = shown.shape
    down, right = frames.shape[1] // rows, frames.shape[2] // columns
    paint = colours.repeat(down, axis=1).repeat(right, axis=2).astype(np.float32)
    where = shown.repeat(down, axis=1).repeat(right, axis=2)[..., None]
    grey = frames.mean(axis=-1, keepdims=True)
    painted = np.where(where, 0.25 * grey + 0.75 * paint, 0.35 * frames + 0.45 * grey + 40)
    return _to_pixels(painted)


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One row of a sheet: a label, a caption below it, and tiles of one size, (F, H, W, 3)."""

    label: str
    caption: str
    tiles: Frames


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
    """Show which identity token every matched frame token took, as two rows of tiles.

    `match_index` holds, for every frame token in raster order, the identity token (raster
    order too); `matched` is True for the tokens whose match was used. Both rows show the first
    pixel frame of every latent frame: equal colours are the same place of the figure.
    """
    shape = identity_foreground.shape
    first = [0, *range(1, identity_frames.shape[0], temporal_ratio)][: shape[0]]
    _, height, width, _ = identity_frames.shape
    factor = enlargement(height, width, _TILE_HEIGHT)
    colours = identity_colours(identity_foreground)
    taken = colours.reshape(-1, 3)[match_index].reshape(*shape, 3)
    identity = overlay_tokens(enlarge(identity_frames[first], factor), colours, identity_foreground)
    frame = overlay_tokens(enlarge(frame_frames[first], factor), taken, matched)
    share = matched.mean()
    return [
        SheetRow("identity", "colour is the place in the figure", identity),
        SheetRow("frame video", f"{caption}: {share:.0%} of the tokens matched", frame),
    ]


def write_sheet(path: Path, *, title: str, subtitle: str, rows: Sequence[SheetRow]) -> None:
    """Write a PNG with a heading and one captioned row of tiles per video.

    Long videos are shown by evenly spaced frames, at most seven; small tiles are enlarged.
    """
    shown = [sheet_tiles(row.tiles) for row in rows]
    tile_height, tile_width = shown[0].shape[1:3]
    columns = max(len(tiles) for tiles in shown)
    big, small = ImageFont.load_default(18), ImageFont.load_default(13)
    body = columns * (tile_width + _GAP) - _GAP
    width = _CAPTION_WIDTH + body + 2 * _MARGIN
    subtitles = _wrap(subtitle, small, width - 2 * _MARGIN)
    header = _MARGIN + 28 + 18 * len(subtitles) + 8
    sheet = Image.new("RGB", (width, header + len(rows) * (tile_height + _GAP) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=big)
    for line, text in enumerate(subtitles):
        draw.text((_MARGIN, _MARGIN + 28 + 18 * line), text, fill=_FADED, font=small)
    for index, (row, tiles) in enumerate(zip(rows, shown, strict=True)):
        top = header + index * (tile_height + _GAP)
        label = ImageFont.load_default(15)
        for line, text in enumerate(_wrap(row.label, label, _CAPTION_WIDTH - _MARGIN)[:2]):
            draw.text((_MARGIN, top + 4 + 18 * line), text, fill=_INK, font=label)
        start = top + 8 + 18 * min(2, len(_wrap(row.label, label, _CAPTION_WIDTH - _MARGIN)))
        for line, text in enumerate(_wrap(row.caption, small, _CAPTION_WIDTH - _MARGIN)[:5]):
            draw.text((_MARGIN, start + 17 * line), text, fill=_FADED, font=small)
        for column, tile in enumerate(tiles):
            left = _MARGIN + _CAPTION_WIDTH + column * (tile_width + _GAP)
            sheet.paste(Image.fromarray(tile), (left, top))
    sheet.save(path, format="PNG", optimize=True)


def _to_pixels(values: NDArray[np.floating]) -> Frames:
    pixels: Frames = np.rint(values).clip(0, 255).astype(np.uint8)
    return pixels


def sheet_tiles(tiles: Frames) -> Frames:
    """Return what a sheet shows of a clip; of its own result it returns all."""
    if len(tiles) > _MAX_COLUMNS:
        tiles = tiles[np.linspace(0, len(tiles) - 1, _MAX_COLUMNS).round().astype(int)]
    height = tiles.shape[1]
    if height >= 2 * _TILE_HEIGHT:  # large videos: tiles as small as those of a small model
        shrink = height // _TILE_HEIGHT
        size = (tiles.shape[2] // shrink, height // shrink)
        small = [
            np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BOX)) for tile in tiles
        ]
        return np.stack(small)
    return enlarge(tiles, max(1, round(_TILE_HEIGHT / height)))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break text at spaces so that every line is at most `width` pixels wide."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _border(foreground: Foreground, width: int) -> Foreground:
    """Foreground pixels within `width` of the background, in each frame."""
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
    """Position of every index in the occupied range, clipped to 0..1."""
    used = np.flatnonzero(occupied)
    if not used.size:
        return np.zeros(occupied.size, dtype=np.float32)
    span = max(1, used[-1] - used[0])
    places: NDArray[np.float32] = ((np.arange(occupied.size) - used[0]) / span).astype(np.float32)
    return places.clip(0, 1)
