"""Writes frames to mp4 files and reads them back, with PyAV.

Frames are uint8, (frames, height, width, 3), RGB. Knows no model, no story and no run directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from bachvid.engine.results import Frames
from bachvid.errors import LayoutError
from bachvid.output.pixels import to_pixels

Metadata = Mapping[str, str | int | float]
# swscale's quick default darkens every colour by one to three levels.
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


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
    """Return the metadata given to `write_mp4`; empty if the file has none."""
    with av.open(str(path)) as container:
        comment = container.metadata.get("comment")
    return dict(json.loads(comment)) if comment else {}


def read_mp4(path: Path, *, shrink: int = 1) -> Frames:
    """Return the frames of an mp4, every `shrink` x `shrink` pixels averaged; H.264 is lossy.

    Raises LayoutError if a side is no multiple of `shrink`.
    """
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
    return to_pixels(blocks.mean(axis=(2, 4)))
