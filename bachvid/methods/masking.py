"""The config keys of methods that use a foreground mask, and their values for a model. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from bachvid.errors import ConfigError
from bachvid.inputs.choices import MaskSoftmax, MaskWords
from bachvid.inputs.sections import Layers, ResolvedSampling, Step
from bachvid.inputs.strict_yaml import quote
from bachvid.methods.base import MethodConfig

if TYPE_CHECKING:
    from bachvid.catalog.facts import ModelFacts


class MaskConfig(MethodConfig):
    """How the foreground mask is made. Layers and steps count from 0."""

    mask_layers: Layers | None = None
    mask_step: Step | None = None
    mask_softmax: MaskSoftmax = "joint"
    mask_words: MaskWords | None = None  # nouns: the story's, or all but function words
    morphology: bool = False
    on_empty_mask: Literal["adapt", "fail"] = "adapt"

    @field_validator("mask_layers")
    @classmethod
    def _check_mask_layers(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return rising_layers(layers)


class ResolvedMaskConfig(MaskConfig):
    """How the foreground mask is made, every value filled in."""

    mask_layers: Layers
    mask_step: Step
    mask_words: MaskWords


def rising_layers(layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the layers of a config key. Raises ValueError if none, or not ascending."""
    if layers is not None and list(layers) != sorted(set(layers)):
        raise ValueError(f"is {quote(list(layers))}: list each layer once, in rising order")
    if layers == ():
        raise ValueError("is []: need at least one layer")
    return layers


def mask_defaults(facts: ModelFacts, sampling: ResolvedSampling) -> dict[str, object]:
    """Return a model's values for the keys of `MaskConfig`."""
    return {
        "mask_layers": facts.attention.mask_layers,
        "mask_step": min(
            facts.step_at(facts.attention.mask_level, sampling.num_steps), sampling.num_steps - 1
        ),
        "mask_words": facts.attention.mask_words,
    }


def check_layers(key: str, layers: tuple[int, ...], facts: ModelFacts) -> None:
    """Raise ConfigError if the model has no such layer."""
    if layers[-1] >= facts.num_layers:
        raise ConfigError(
            f"method.{key}: has layer {layers[-1]}: {facts.name} has {facts.num_layers} "
            f"layers, 0 to {facts.num_layers - 1}"
        )


def check_mask(config: ResolvedMaskConfig, facts: ModelFacts, sampling: ResolvedSampling) -> None:
    """Raise ConfigError if the mask's layers or its step do not exist."""
    check_layers("mask_layers", config.mask_layers, facts)
    if config.mask_step >= sampling.num_steps:
        raise ConfigError(
            f"method.mask_step: is {config.mask_step}: with sampling.num_steps "
            f"{sampling.num_steps} the last step is {sampling.num_steps - 1}"
        )
