"""Writes the files of a rendered video that the config's `output` section asks for.

Combines the writers (`mp4`, `sheets`, `overlays`) with the plan's captions, the metadata and the
paths in the run directory. Knows no order of work. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bachvid import __version__
from bachvid.atomic import write_atomically
from bachvid.engine.results import Foreground, Frames
from bachvid.inputs.story import IDENTITY_ID
from bachvid.output.journal import RunHeader
from bachvid.output.mp4 import Metadata, read_metadata, read_mp4, write_mp4
from bachvid.output.overlays import match_rows, overlay_mask, upsample_foreground
from bachvid.output.pixels import enlarge, enlargement
from bachvid.output.run_directory import RunDirectory
from bachvid.output.sheets import SheetRow, sheet_tiles, write_sheet
from bachvid.planning.config import ResolvedConfig
from bachvid.planning.plan import RenderPlan, ScenePlan, VideoPlan

if TYPE_CHECKING:
    from bachvid.engine.results import RenderedVideo

ENLARGEMENT = "enlargement"  # metadata key of an mp4


@dataclass(frozen=True, slots=True)
class IdentityPicture:
    """The part of an identity video that the overlays of its frame videos show."""

    frames: Frames
    foreground: Foreground | None  # in tokens


def run_header(plan: RenderPlan) -> RunHeader:
    """Return the first line of the journal of what `plan` renders."""
    story = plan.story.model_dump(mode="json")
    canonical = json.dumps(story, sort_keys=True, separators=(",", ":"))
    return RunHeader(
        story=story,
        config=plan.config.model_dump(mode="json"),
        story_hash=hashlib.sha256(canonical.encode()).hexdigest(),
        config_hash=plan.config.sha256,
        bachvid=__version__,
    )


def wanted_files(run: RunDirectory, plan: RenderPlan, *, scene: str, video: str) -> dict[str, Path]:
    """Return the paths of the files that a plan wants of a video, by their kind."""
    shown = plan.shows - {"match"} if video == IDENTITY_ID else plan.shows
    files = {"mp4": run.file(scene, f"{video}.mp4")}
    if "mask" in shown:
        files["mask"] = run.file(scene, "masks", f"{video}.npz")
    if plan.config.output.overlays:
        for overlay in sorted(shown):
            files[f"{overlay}_overlay"] = run.file(scene, "overlays", f"{video}.{overlay}.png")
    if plan.config.output.frames:
        files["frames"] = run.file(scene, "frames", f"{video}.npz")
    return files


def write_files(
    files: Mapping[str, Path],
    *,
    config: ResolvedConfig,
    temporal_ratio: int,
    video: VideoPlan,
    rendered: RenderedVideo,
    identity: IdentityPicture,
    config_sha256: str,
) -> dict[Path, str]:
    """Write `files` (by kind, as `wanted_files`) of one video. Return the sha256 of each.

    Raises OSError if the disk is full, LayoutError for frames that no mask covers evenly.
    """
    frames = rendered.frames
    _, height, width, _ = frames.shape
    factor = enlargement(height, width, config.output.min_height)
    in_tokens: dict[str, Foreground] = {}  # by name: empty for a method that takes no mask
    in_pixels: dict[str, Foreground] = {}
    if rendered.foreground is not None:
        in_tokens["foreground"] = rendered.foreground
        in_pixels["foreground"] = upsample_foreground(
            rendered.foreground, temporal_ratio=temporal_ratio, height=height, width=width
        )

    metadata: Metadata = {
        "bachvid": __version__,
        "prompt": video.prompt.text,
        "seed": video.seed,
        "config_sha256": config_sha256,
        "frames_sha256": rendered.frames_sha256,
        ENLARGEMENT: factor,
    }
    writers: dict[str, Callable[[Path], None]] = {
        "mp4": lambda path: write_mp4(
            enlarge(frames, factor),
            path,
            fps=config.output.fps,
            crf=config.output.crf,
            metadata=metadata,
        ),
        "mask": lambda path: _write_arrays(path, **in_tokens),
        "mask_overlay": lambda path: _write_mask_overlay(
            path, video=video, frames=frames, **in_pixels
        ),
        "match_overlay": lambda path: _write_match_overlay(
            path, video=video, rendered=rendered, identity=identity, temporal_ratio=temporal_ratio
        ),
        "frames": lambda path: _write_arrays(
            path, frames=frames, latents=rendered.latents, **in_pixels
        ),
    }
    return {path: write_atomically(path, writers[kind]) for kind, path in files.items()}


def contact_sheet(run: RunDirectory, scene: ScenePlan) -> Path:
    """Return the path of a scene's contact sheet."""
    return run.file(scene.scene.id, "contact-sheet.png")


def write_contact_sheet(run: RunDirectory, scene: ScenePlan, tiles: Mapping[str, Frames]) -> None:
    """Write a scene's contact sheet; the videos that `tiles` lacks are read back from their mp4."""
    rows = []
    for video in scene.videos:
        path = run.contents.file(scene.scene.id, video.id, ".mp4")
        if path is None or not path.exists():  # it failed, now or when it was rendered again
            continue
        shown = tiles[video.id] if video.id in tiles else sheet_tiles(read_video(path))
        rows.append(SheetRow(video.id, _caption(video, scene), shown))
    if not rows:
        return
    write_atomically(
        contact_sheet(run, scene),
        lambda path: write_sheet(
            path,
            title=scene.scene.id,
            subtitle=f"{scene.scene.background}, {scene.scene.character}",
            rows=rows,
        ),
    )


def write_preview(path: Path, video: VideoPlan, frames: Frames) -> None:
    """Write a picture of the estimated video; it is no file of the finished run."""
    row = SheetRow(video.id, "preview", frames)
    write_atomically(
        path,
        lambda temporary: write_sheet(
            temporary, title=video.id, subtitle=video.prompt.text, rows=[row]
        ),
    )


def read_identity(run: RunDirectory, scene: ScenePlan) -> IdentityPicture:
    """Return the picture of a finished identity video. Its frames are lossy: for overlays only."""
    name = scene.scene.id
    path = run.file(name, "masks", f"{IDENTITY_ID}.npz")
    foreground: Foreground | None = None
    if path.exists():
        with np.load(path) as arrays:
            foreground = arrays["foreground"]
    return IdentityPicture(read_video(run.file(name, f"{IDENTITY_ID}.mp4")), foreground)


def read_video(path: Path) -> Frames:
    """Return the frames of a run's mp4 at the size of the model; they are lossy."""
    return read_mp4(path, shrink=int(read_metadata(path).get(ENLARGEMENT, 1)))


def _caption(video: VideoPlan, scene: ScenePlan) -> str:
    text = video.action.text if video.action else scene.scene.identity
    return f"seed {video.seed}" if text == video.id else f"{text}, seed {video.seed}"


def _write_arrays(path: Path, **arrays: NDArray[np.generic]) -> None:
    with path.open("wb") as file:  # given a path, NumPy appends .npz to it
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _write_mask_overlay(
    path: Path, *, video: VideoPlan, frames: Frames, foreground: Foreground
) -> None:
    factor = max(1, -(-192 // frames.shape[1]))
    large = overlay_mask(
        enlarge(frames, factor), foreground.repeat(factor, axis=1).repeat(factor, axis=2)
    )
    row = SheetRow("foreground", f"{foreground.mean():.0%} of the pixels", large)
    write_sheet(path, title=f"{video.id}: mask", subtitle=video.prompt.text, rows=[row])


def _write_match_overlay(
    path: Path,
    *,
    video: VideoPlan,
    rendered: RenderedVideo,
    identity: IdentityPicture,
    temporal_ratio: int,
) -> None:
    matched = rendered.matched
    assert matched is not None, "of a method that shows no match none is wanted"
    assert identity.foreground is not None, "what is matched has a mask"
    rows: Sequence[SheetRow] = match_rows(
        identity_frames=identity.frames,
        frame_frames=rendered.frames,
        identity_foreground=identity.foreground,
        match_index=matched.index_N,
        matched=matched.used,
        temporal_ratio=temporal_ratio,
        caption=video.id,
    )
    subtitle = f"{video.prompt.text}: equal colours are tokens that were matched"
    write_sheet(path, title=f"{video.id}: matches", subtitle=subtitle, rows=rows)
