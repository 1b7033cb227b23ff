"""Frames to files: sizes, colours, metadata and masks survive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bachvid.engine.results import Foreground, Frames
from bachvid.errors import LayoutError
from bachvid.output.mp4 import read_metadata, read_mp4, write_mp4
from bachvid.output.overlays import identity_colours, match_rows, overlay_mask, upsample_foreground
from bachvid.output.pixels import enlarge, enlargement
from bachvid.output.sheets import SheetRow, write_sheet


def colour_blocks() -> Frames:
    """Five frames of saturated 4x4 pixel blocks, whose colours move."""
    colours = np.array([[220, 30, 30], [30, 200, 40], [40, 40, 210], [240, 230, 40]], np.uint8)
    index = (np.arange(5)[:, None, None] + np.arange(8)[:, None] + np.arange(6)) % 4
    frames: Frames = colours[index].repeat(4, axis=1).repeat(4, axis=2)
    return frames


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(48, 48, 8), (480, 720, 1), (320, 320, 1), (319, 320, 2), (321, 320, 2), (64, 96, 6)],
)
def test_enlargement_reaches_the_height_with_even_sides(
    height: int, width: int, expected: int
) -> None:
    assert enlargement(height, width, 320) == expected


def test_an_mp4_gives_back_its_colours_and_metadata(tmp_path: Path) -> None:
    frames = colour_blocks()
    path = tmp_path / "clip.mp4"
    write_mp4(enlarge(frames, 8), path, fps=8, crf=8, metadata={"seed": 3, "bachvid": "0"})
    back = read_mp4(path, shrink=8)
    assert back.shape == frames.shape
    difference = np.abs(back.astype(int) - frames)
    assert np.median(difference) <= 2  # the colours themselves
    assert difference.mean() < 6  # and what 4:2:0 mixes at their edges
    assert read_metadata(path) == {"seed": 3, "bachvid": "0"}


def test_an_mp4_plays_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_mp4(colour_blocks(), path, fps=8, crf=16, metadata={})
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_odd_sides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"cannot encode 6x7: H\.264 needs even sides"):
        write_mp4(np.zeros((1, 7, 6, 3), np.uint8), tmp_path / "x.mp4", fps=8, crf=8, metadata={})


def test_the_first_latent_frame_covers_one_pixel_frame() -> None:
    tokens = np.zeros((3, 2, 2), dtype=bool)
    tokens[0, 0, 0] = tokens[1, 0, 1] = tokens[2, 1, 1] = True
    pixels = upsample_foreground(tokens, temporal_ratio=4, height=6, width=4)
    assert pixels.shape == (9, 6, 4)
    assert [frame.sum() for frame in pixels] == [6] * 9
    assert pixels[0, :3, :2].all()
    assert pixels[1:5, :3, 2:].all()
    assert pixels[5:, 3:, 2:].all()


def test_a_mask_that_does_not_divide_the_pixels_is_refused() -> None:
    with pytest.raises(LayoutError, match="2x2 tokens does not cover 5x4 pixels"):
        upsample_foreground(np.zeros((1, 2, 2), bool), temporal_ratio=4, height=5, width=4)


def test_the_overlay_outlines_the_foreground() -> None:
    frames = np.full((1, 32, 32, 3), 100, np.uint8)
    foreground = np.zeros((1, 32, 32), bool)
    foreground[0, 8:24, 8:24] = True
    shown = overlay_mask(frames, foreground)
    assert (shown[0, 8, 8:24] == shown[0, 8, 8]).all()  # the border is one colour
    assert (shown[0, 12, 12] != shown[0, 8, 8]).any()
    assert (shown[0, 12, 12] != shown[0, 2, 2]).any()


def figure(top: int, left: int) -> Foreground:
    """A figure of 4x2 tokens in each of three latent frames of 8x8."""
    foreground = np.zeros((3, 8, 8), bool)
    foreground[:, top : top + 4, left : left + 2] = True
    return foreground


def test_matched_tokens_take_the_colour_of_their_identity_token() -> None:
    identity, frame = figure(2, 1), figure(3, 5)
    index = np.zeros((3, 8, 8), np.int64)
    index[frame] = np.flatnonzero(identity)
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    top, bottom = match_rows(
        identity_frames=frames,
        frame_frames=frames,
        identity_foreground=identity,
        match_index=index.ravel(),
        matched=frame,
        temporal_ratio=2,
        caption="jumps",
    )
    scale = top.tiles.shape[1] // 8
    shown = top.tiles[:, 2 * scale : 6 * scale, scale : 3 * scale]
    np.testing.assert_array_equal(
        bottom.tiles[:, 3 * scale : 7 * scale, 5 * scale : 7 * scale], shown
    )
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 8  # every token has its own colour


def test_an_empty_mask_has_no_colours_to_trip_over() -> None:
    assert identity_colours(np.zeros((2, 3, 3), bool)).shape == (2, 3, 3, 3)


@pytest.mark.parametrize("shape", [(5, 16, 16, 3), (49, 320, 480, 3), (1, 480, 720, 3)])
def test_a_sheet_shows_at_most_seven_frames(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "sheet.png"
    rows = [SheetRow("jumps " * 12, "a long caption " * 30, np.zeros(shape, np.uint8))] * 2
    write_sheet(path, title="lighthouse", subtitle="a forest, a girl " * 20, rows=rows)
    with Image.open(path) as image:
        assert image.width < 2000
        assert image.height < 700
