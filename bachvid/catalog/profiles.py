"""What methods need to know of a model: its layers and its noise levels. No torch.

The paper counts layers from 1, the code from 0. Layers are published for one depth only; for
others we take those at the same relative depth.
Source: BachVid (arXiv 2510.21696v1), Sec. 3.2-3.4, App. B; its review version, App. B, for Wan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from bachvid.inputs.choices import Dtype, MaskWords, ProfileName, SchedulerName
from bachvid.inputs.story import NoisePolicy

# How far the noise is gone: 0 at the first step, 1 at the end. Equal levels are equal noise,
# whatever the number of steps and the flow shift are: of a flow model a level is 1 - sigma, of
# others the share of the schedule that is done.
Level = Annotated[float, Field(ge=0, le=1)]


class AttentionFacts(BaseModel):
    """What methods need to know of a model. Layers count from 0.

    inject_levels: the level at which injection ends, for each profile; `paper` is as published.
    mask_words: the review version of the paper takes masks from nouns where the text has a
        cross-attention (Wan), else from whole phrases.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vital_layers: tuple[int, ...]
    mask_layers: tuple[int, ...]
    match_layers: tuple[int, ...]
    mask_level: Level
    inject_levels: Mapping[ProfileName, Level]
    mask_words: MaskWords = "all"


class DefaultFacts(BaseModel):
    """Values for keys that a config leaves out. `seconds_per_forward` was measured on 2 cores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pixel_frames: int
    height: int
    width: int
    fps: int
    num_steps: int
    guidance_scale: float
    scheduler: SchedulerName
    dtype: Dtype
    noise: NoisePolicy
    seconds_per_forward: float | None = None


def cogvideox_attention(num_layers: int) -> AttentionFacts:
    """Return the layers and levels of a CogVideoX; those of the 42 layers of 5b are published."""
    vital_layers = (0, 1, 11, 12, 13, 14, 15, 17, 19, 20, 21, 23, 29, 34, 41)
    return AttentionFacts(
        vital_layers=_at_depth(vital_layers, num_layers, published=42),
        mask_layers=_at_depth(range(5, 20), num_layers, published=42),
        match_layers=_at_depth(range(1, 16), num_layers, published=42),
        mask_level=5 / 50,
        inject_levels={"paper": 0.52, "fast": 0.48},
    )


def wan_attention(num_layers: int, flow_shift: float) -> AttentionFacts:
    """Return the layers and levels of a Wan2.1; those of the 40 layers of 14B are published.

    The mask level is that of the published step at the model's published flow shift. No injected
    steps are published for Wan: they are CogVideoX's.
    """
    vital_layers = (0, 1, 16, 21, 23, 28, 32, 33, 34, 38, 39)
    return AttentionFacts(
        vital_layers=_at_depth(vital_layers, num_layers, published=40),
        mask_layers=_at_depth(range(2, 10), num_layers, published=40),
        match_layers=_at_depth(range(1, 7), num_layers, published=40),
        mask_level=flow_level(9 / 50, flow_shift),
        inject_levels={"paper": flow_level(0.52, flow_shift), "fast": flow_level(0.48, flow_shift)},
        mask_words="nouns",
    )


def flow_level(done: float, flow_shift: float) -> float:
    """Return the noise level of a flow model after a share `done` of its schedule."""
    left = 1 - done
    return 1 - flow_shift * left / (1 + (flow_shift - 1) * left)


def share_done(level: float, flow_shift: float) -> float:
    """Return the share of a flow model's schedule that is done at a level: inverts `flow_level`."""
    sigma = 1 - level
    return 1 - sigma / (flow_shift - (flow_shift - 1) * sigma)


def _at_depth(layers: range | tuple[int, ...], depth: int, *, published: int) -> tuple[int, ...]:
    scale = (depth - 1) / (published - 1)
    return tuple(sorted({round(layer * scale) for layer in layers}))
