"""What all models of one family have in common. Data only: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bachvid.catalog.files import Component
from bachvid.inputs.choices import Dtype, SchedulerName
from bachvid.layout.gangs import Branch


@dataclass(frozen=True, slots=True)
class ComponentTraits:
    """The dtypes in which the weights of a component are held.

    Weights have the dtype `model.dtype`, except for tensors that stay in fp32: all of them with
    `is_fp32`; else, if `model.dtype` is in `fp32_in`, those whose dotted names contain one of
    `fp32_words`.
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

    values: peak number of values in memory per pixel of a tile, beside the frames; measured on the
        published autoencoder, whose full-resolution layers have `channels` channels.
    tiled_from: frames with fewer pixels than this are decoded and encoded in one tile.
    tile, stride: size and distance of the overlapping tiles of larger frames.
    """

    values: int
    channels: int
    tiled_from: int
    tile: tuple[int, int]
    stride: tuple[int, int]


@dataclass(frozen=True, slots=True)
class FamilyFacts:
    """The traits that all models of one family share.

    pipeline: the diffusers class that `model_index.json` names.
    passes: the forwards of one guided step, in order: the CFG branches that share each.
    has_joint_text: text tokens take part in the video's self-attention; else in a cross-attention.
    size_step: the stock pipeline refuses heights and widths that are no multiple of it.
    cleans_text: the stock pipeline unescapes HTML in prompts.
    text_tokens: the length of prompts, if no file of a model says it; `storybook.json` may.
    adds_in_fp32: the blocks' residual additions, and the norm behind them, are computed in fp32.
    makes_rotary: the transformer builds its own rotary table in every forward.
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
