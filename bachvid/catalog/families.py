"""What all models of one family have in common. Data only: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bachvid.catalog.files import Component
from bachvid.inputs.choices import Dtype, SchedulerName
from bachvid.layout.gangs import Branch


@dataclass(frozen=True, slots=True)
class ComponentTraits:
    """In which dtypes the weights of a component are held.

    Those are the dtype of `model.dtype`, but for tensors that stay in fp32: all with `is_fp32`,
    else those with one of `fp32_words` in their dotted names, where that dtype is in `fp32_in`.
    """

    is_fp32: bool = False
    fp32_words: frozenset[str] = frozenset()
    fp32_in: tuple[Dtype, ...] = ("bfloat16", "float16")

    def dtype(self, chosen: Dtype) -> Dtype:
        """Return the dtype of all tensors but those that stay in fp32 by their names."""
        return "float32" if self.is_fp32 else chosen


@dataclass(frozen=True, slots=True)
class DecoderTraits:
    """How the autoencoder decodes. Sizes in pixels, as (height, width).

    values: in memory at its peak for each pixel of a tile, beside the frames; measured in the
        published autoencoder, whose layers at full resolution have `channels`.
    tiled_from: videos with fewer pixels in a frame are decoded, and encoded, in one tile.
    tile, stride: of overlapping tiles in larger videos.
    """

    values: int
    channels: int
    tiled_from: int
    tile: tuple[int, int]
    stride: tuple[int, int]


@dataclass(frozen=True, slots=True)
class FamilyFacts:
    """One family.

    pipeline: the diffusers class that `model_index.json` names.
    passes: the forwards of one guided step, in their order, by the CFG branches that share one.
    has_joint_text: text tokens stand in the video's own attention, not in one beside it.
    size_step: the stock pipeline refuses sizes in pixels that this does not divide.
    cleans_text: the stock pipeline unescapes HTML in prompts.
    text_tokens: the length of prompts where no file of a model says it, so that ours may.
    adds_in_fp32: blocks add to the hidden states in fp32, and those are normed in it behind them.
    makes_rotary: the transformer makes its own table of positions in every forward.
    """

    name: str
    pipeline: str
    schedulers: tuple[SchedulerName, ...]
    passes: tuple[tuple[Branch, ...], ...]
    has_joint_text: bool
    size_step: int
    cleans_text: bool
    text_tokens: int | None
    adds_in_fp32: bool
    makes_rotary: bool
    components: Mapping[Component, ComponentTraits]
    decoder: DecoderTraits
