"""What a model's config takes that says nothing, among it the paper's values. No torch.

The paper counts layers from 1, the code from 0. For another depth than the paper's no layers are
published; there we take those at the same relative depth.
Source: BachVid (arXiv 2510.21696v1), Sec. 3.2-3.4, App. B; its review version, App. B, for Wan.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from bachvid.inputs.choices import (
    Branches,
    Dtype,
    MaskSoftmax,
    MaskWords,
    MatchWithin,
    PrePassInjection,
    SchedulerName,
)
from bachvid.inputs.story import NoisePolicy


class ProfileFacts(BaseModel):
    """A named way to run the method on one model. Layers count from 0; fractions are of steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vital_layers: tuple[int, ...]
    mask_layers: tuple[int, ...]
    match_layers: tuple[int, ...]
    mask_fraction: float = Field(ge=0, lt=1)
    inject_fraction: tuple[float, float]
    branches: Branches
    pre_passes: int = Field(1, ge=1)
    pre_pass_injection: PrePassInjection
    match_threshold: float = Field(0.5, ge=-1, le=1)
    mask_softmax: MaskSoftmax = "joint"
    mask_words: MaskWords = "all"
    match_within: MatchWithin = "video"


class DefaultFacts(BaseModel):
    """What a config takes that says nothing. `seconds_per_forward` was measured on 2 CPU cores."""

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


def cogvideox_profiles(num_layers: int) -> dict[str, ProfileFacts]:
    """Return both profiles for a CogVideoX of `num_layers`; published are the layers of 42 (5b)."""
    vital_layers = (0, 1, 11, 12, 13, 14, 15, 17, 19, 20, 21, 23, 29, 34, 41)
    paper = ProfileFacts(
        vital_layers=_at_depth(vital_layers, num_layers, published=42),
        mask_layers=_at_depth(range(5, 20), num_layers, published=42),
        match_layers=_at_depth(range(1, 16), num_layers, published=42),
        mask_fraction=5 / 50,
        inject_fraction=(0.0, 0.52),
        branches="both",
        pre_pass_injection="background",
    )
    return {"paper": paper, "fast": _fast(paper)}


def wan_profiles(num_layers: int) -> dict[str, ProfileFacts]:
    """Return both profiles for a Wan2.1 of `num_layers`; published are the layers of 40 (14B).

    Injected steps are those of CogVideoX: none are published for Wan.
    """
    vital_layers = (0, 1, 16, 21, 23, 28, 32, 33, 34, 38, 39)
    paper = ProfileFacts(
        vital_layers=_at_depth(vital_layers, num_layers, published=40),
        mask_layers=_at_depth(range(2, 10), num_layers, published=40),
        match_layers=_at_depth(range(1, 7), num_layers, published=40),
        mask_fraction=9 / 50,
        inject_fraction=(0.0, 0.52),
        branches="both",
        pre_pass_injection="background",
        mask_words="nouns",
    )
    return {"paper": paper, "fast": _fast(paper)}


def _fast(paper: ProfileFacts) -> ProfileFacts:
    """Inject at all steps, but the conditional branch only, and nothing in the pre-pass."""
    return paper.model_copy(
        update={"inject_fraction": (0.0, 1.0), "branches": "cond", "pre_pass_injection": "none"}
    )


def _at_depth(layers: range | tuple[int, ...], depth: int, *, published: int) -> tuple[int, ...]:
    scale = (depth - 1) / (published - 1)
    return tuple(sorted({round(layer * scale) for layer in layers}))
