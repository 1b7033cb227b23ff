"""The method `none`: the model by itself, observed in the same way as the other methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from bachvid.inputs.choices import MaskWords
from bachvid.inputs.sections import Layers, ResolvedSampling, Step, resolved_section
from bachvid.methods.base import Method, MethodConfig, Overlay, Role, RunControl, RunInputs
from bachvid.methods.masking import MaskConfig, ResolvedMaskConfig, check_mask, mask_defaults

if TYPE_CHECKING:
    from bachvid.catalog.facts import ModelFacts


class NoneConfig(MaskConfig):
    """No method; the foreground mask is made as in others, for evaluations."""

    name: Literal["none"] = "none"


class ResolvedNone(NoneConfig, ResolvedMaskConfig):
    """No method, every value filled in."""

    mask_layers: Layers
    mask_step: Step
    mask_words: MaskWords


class Vanilla(Method[ResolvedNone]):
    """Makes masks at the mask step, so that an evaluation has them; changes no pixel."""

    Config = NoneConfig

    @classmethod
    def resolve(
        cls, config: MethodConfig, facts: ModelFacts, sampling: ResolvedSampling
    ) -> MethodConfig:
        """Fill in what the section leaves out, and check it. Raises ConfigError."""
        # All words, on any model: what changes no pixel must not refuse a prompt without nouns.
        defaults = {**mask_defaults(facts, sampling), "mask_words": "all"}
        resolved = resolved_section(config, ResolvedNone, **defaults)
        check_mask(resolved, facts, sampling)
        return resolved

    @property
    def observed_at(self) -> int:
        """The mask step."""
        return self.config.mask_step

    @property
    def mask_words(self) -> MaskWords:
        """Which words of a segment stand for it in masks."""
        return self.config.mask_words

    @property
    def shows(self) -> frozenset[Overlay]:
        """Masks; nothing is matched."""
        return frozenset({"mask"})

    @property
    def lines(self) -> Mapping[str, str]:
        """What a plan says of it, by a label."""
        return {"method": "none: every video on its own"}

    def control(self, role: Role, number: int, given: RunInputs) -> RunControl:
        """Observe; nothing is recorded."""
        from bachvid.methods.controls.observing import VideoObserver  # imports torch

        return VideoObserver(given, self.config, match_layers=())
