"""What a model is: sizes, defaults, layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from bachvid.catalog.families import FamilyFacts
from bachvid.catalog.files import Component, ComponentSize
from bachvid.catalog.profiles import AttentionFacts, DefaultFacts, share_done
from bachvid.errors import ConfigError
from bachvid.inputs.choices import SchedulerName
from bachvid.inputs.sections import ResolvedVideo
from bachvid.layout.gangs import Branch
from bachvid.layout.tokens import TokenLayout


class Vocabulary(BaseModel):
    """The phrases that a model was trained on, where those are all that it understands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    background: tuple[str, ...]
    character: tuple[str, ...]
    action: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The sizes and defaults of one model. `folder` is None for a Hub model not downloaded."""

    name: str
    traits: FamilyFacts  # of its family
    folder: Path | None
    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int  # channels within a feed-forward
    text_tokens: int  # the length that every prompt is padded to
    text_dim: int
    has_rope: bool
    patch_size: int  # latents per token, along height and width; along time it is 1
    latent_channels: int
    vae_channels: int  # of the autoencoder's layers at full resolution
    spatial_ratio: int  # pixels per latent, along height and width
    temporal_ratio: int  # pixel frames per latent frame, after the first
    defaults: DefaultFacts
    attention: AttentionFacts
    max_grid: int | None = None  # tokens along each axis that there are positions for
    vocabulary: Vocabulary | None = None
    flow_shift: float | None = None  # of the weights; None: not a flow model
    sizes: Mapping[Component, ComponentSize] | None = None  # if published; else its files say it

    @property
    def family(self) -> str:
        """The name of its family."""
        return self.traits.name

    @property
    def schedulers(self) -> tuple[SchedulerName, ...]:
        """The schedulers that the family has."""
        return self.traits.schedulers

    @property
    def passes(self) -> tuple[tuple[Branch, ...], ...]:
        """The forwards of one guided step, in order: the CFG branches that share each."""
        return self.traits.passes

    @property
    def cleans_text(self) -> bool:
        """Whether prompts are cleaned before they are tokenized."""
        return self.traits.cleans_text

    @property
    def joint_text_tokens(self) -> int:
        """Text tokens in the video's self-attention; 0 where text has a cross-attention."""
        return self.text_tokens if self.traits.has_joint_text else 0

    def step_at(self, level: float, num_steps: int) -> int:
        """Return the step of a schedule that begins nearest to a noise level."""
        done = level if self.flow_shift is None else share_done(level, self.flow_shift)
        return round(done * num_steps)

    def layout(self, video: ResolvedVideo) -> TokenLayout:
        """Return the token layout of a video. Raises ConfigError for an illegal size."""
        grid = self.grid(video.pixel_frames, video.height, video.width)
        return TokenLayout(self.joint_text_tokens, *grid)

    def grid(self, pixel_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the token grid (latent_frames, grid_height, grid_width) of a video.

        Raises ConfigError with the nearest legal values.
        """
        frame_stride = self.temporal_ratio
        if (pixel_frames - 1) % frame_stride:
            nearest = _nearest(pixel_frames - 1, frame_stride, first=0)
            raise ConfigError(
                f"video.pixel_frames: is {pixel_frames}: must be 1 more than a multiple of "
                f"{frame_stride}; nearest are {' and '.join(str(n + 1) for n in nearest)}"
            )
        stride = math.lcm(self.traits.size_step, self.spatial_ratio * self.patch_size)
        for name, size in (("height", height), ("width", width)):
            if size % stride:
                nearest = _nearest(size, stride, first=stride)
                raise ConfigError(
                    f"video.{name}: is {size}: must be a multiple of {stride}; "
                    f"nearest are {' and '.join(map(str, nearest))}"
                )
        token_pixels = self.spatial_ratio * self.patch_size
        latent_frames = (pixel_frames - 1) // frame_stride + 1
        grid = latent_frames, height // token_pixels, width // token_pixels
        for name, tokens in zip(("pixel_frames", "height", "width"), grid, strict=True):
            if self.max_grid is not None and tokens > self.max_grid:
                raise ConfigError(
                    f"video.{name}: makes {tokens} tokens along this axis: {self.name} has "
                    f"positions for {self.max_grid}; choose a smaller video"
                )
        return grid


@dataclass(frozen=True, slots=True)
class Family:
    """What the file of a family in this folder offers to the registry.

    read: returns the facts of a diffusers folder, given the name of the model. Raises
        ModelSupportError if the folder is damaged, or if we do not run the model in it.
    published: the facts of published models, by Hub id.
    """

    traits: FamilyFacts
    read: Callable[[Path, str], ModelFacts]
    published: Mapping[str, ModelFacts]


def _nearest(value: int, stride: int, *, first: int) -> list[int]:
    below = value // stride * stride
    return [legal for legal in (below, below + stride) if legal >= first]
