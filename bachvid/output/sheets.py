"""Sheets: PNG files with a heading and captioned rows of tiles.

Tiles are frames, uint8, (frames, height, width, 3), all of a sheet of one height. Knows no model,
no story and no run directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bachvid.engine.results import Frames
from bachvid.output.pixels import enlarge

_PAPER = (250, 249, 246)
_INK = (34, 34, 38)
_FADED = (116, 116, 122)
_MARGIN = 16
_GAP = 6
_CAPTION_WIDTH = 190
TILE_HEIGHT = 144  # pixels, about: small videos are enlarged to it, large ones shrunk
_MAX_COLUMNS = 7


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One row of a sheet: a label, a caption below it, and tiles of one size, (F, H, W, 3)."""

    label: str
    caption: str
    tiles: Frames


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


def sheet_tiles(tiles: Frames) -> Frames:
    """Return the tiles that a sheet shows of a clip: at most seven, scaled. Idempotent."""
    if len(tiles) > _MAX_COLUMNS:
        tiles = tiles[np.linspace(0, len(tiles) - 1, _MAX_COLUMNS).round().astype(int)]
    height = tiles.shape[1]
    if height >= 2 * TILE_HEIGHT:  # large videos: tiles as small as those of a small model
        shrink = height // TILE_HEIGHT
        size = (tiles.shape[2] // shrink, height // shrink)
        small = [
            np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BOX)) for tile in tiles
        ]
        return np.stack(small)
    return enlarge(tiles, max(1, round(TILE_HEIGHT / height)))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break text at spaces so that every line is at most `width` pixels wide."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
