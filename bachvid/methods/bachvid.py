"""BachVid: foreground and background of a frame video attend to keys of an identity video.

The data of the method; its controls are in `bachvid.methods.controls`. A profile is the same
algorithm on every model: layers and noise levels come from the model, all else from the profile.
Source: BachVid (arXiv 2510.21696v1). What the paper leaves open is a config key; the reasons for
its value stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from bachvid.errors import ConfigError
from bachvid.inputs.choices import Branches, MaskWords, MatchWithin, PrePassInjection, ProfileName
from bachvid.inputs.sections import Count, Layers, ResolvedSampling, Step, Steps, resolved_section
from bachvid.inputs.strict_yaml import quote
from bachvid.layout.gangs import BRANCHES, Branch
from bachvid.layout.records import AttentionSite, Records, RecordSet
from bachvid.methods.base import (
    Matching,
    Method,
    MethodConfig,
    Overlay,
    Role,
    Run,
    RunControl,
    RunInputs,
    reads_own,
)
from bachvid.methods.masking import (
    MaskConfig,
    ResolvedMaskConfig,
    check_layers,
    check_mask,
    mask_defaults,
    rising_layers,
)

if TYPE_CHECKING:
    from bachvid.catalog.facts import ModelFacts

Threshold = Annotated[float, Field(ge=-1, le=1)]  # cosine similarity


class BachVidConfig(MaskConfig):
    """What is recorded and injected. Layers and steps count from 0; ranges are half-open."""

    name: Literal["bachvid"] = "bachvid"
    profile: ProfileName = "fast"
    vital_layers: Layers | None = None
    match_layers: Layers | None = None
    inject_steps: Steps | None = None  # [first, last)
    branches: Branches | None = None
    pre_passes: Count | None = None  # each but the first injects what the previous one found
    pre_pass_injection: PrePassInjection | None = None  # in the first one
    match_threshold: Threshold | None = None
    match_within: MatchWithin | None = None

    @field_validator("vital_layers", "match_layers")
    @classmethod
    def _check_layers(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return rising_layers(layers)

    @field_validator("inject_steps", mode="before")
    @classmethod
    def _check_pair(cls, steps: object) -> object:
        if isinstance(steps, list) and len(steps) != 2:
            raise ValueError(f"is {quote(steps)}: must be two steps, [first, last)")
        return steps

    @field_validator("inject_steps")
    @classmethod
    def _check_steps(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 0 <= steps[0] < steps[1]:
            raise ValueError(f"is {list(steps)}: need 0 <= first < last")
        return steps


class ResolvedBachVid(BachVidConfig, ResolvedMaskConfig):
    """What is recorded and injected, every value filled in."""

    mask_layers: Layers
    mask_step: Step
    mask_words: MaskWords
    vital_layers: Layers
    match_layers: Layers
    inject_steps: Steps
    branches: Branches
    pre_passes: Count
    pre_pass_injection: PrePassInjection
    match_threshold: Threshold
    match_within: MatchWithin


@dataclass(frozen=True, slots=True)
class Profile:
    """A named way to run the method, on any model."""

    branches: Branches
    pre_passes: int
    pre_pass_injection: PrePassInjection
    match_threshold: float
    match_within: MatchWithin


PROFILES: Mapping[ProfileName, Profile] = {
    # As published. The pre-pass injects background and a match needs a minimum cosine, as in the
    # code of CharaConsist, on which BachVid was built.
    "paper": Profile("both", 1, "background", 0.5, "video"),
    # The default, which the tables in docs/results favour: injecting the conditional branch alone
    # is more consistent at half the cost; the second pre-pass takes mask and match from a figure
    # that already resembles the identity's; and within the foreground every match is useful.
    "fast": Profile("cond", 2, "none", -1.0, "foreground"),
}


class BachVid(Method[ResolvedBachVid]):
    """The method of the paper."""

    Config = BachVidConfig

    @classmethod
    def resolve(
        cls, config: MethodConfig, facts: ModelFacts, sampling: ResolvedSampling
    ) -> MethodConfig:
        """Fill in the values of the profile and of the model, and check them.

        Raises ConfigError.
        """
        assert isinstance(config, BachVidConfig)
        level = facts.attention.inject_levels[config.profile]
        resolved = resolved_section(
            config,
            ResolvedBachVid,
            **mask_defaults(facts, sampling),
            **asdict(PROFILES[config.profile]),
            vital_layers=facts.attention.vital_layers,
            match_layers=facts.attention.match_layers,
            inject_steps=(0, max(facts.step_at(level, sampling.num_steps), 1)),
        )
        check_mask(resolved, facts, sampling)
        check_layers("vital_layers", resolved.vital_layers, facts)
        check_layers("match_layers", resolved.match_layers, facts)
        _check_steps(resolved, sampling)
        return resolved

    @property
    def records(self) -> Records:
        """Keys and values of the vital layers, at all steps that some run reads."""
        steps = {step for run in self.runs("frame") for step in run.sources}
        kinds = RecordSet(
            ("key", "value"), self.config.vital_layers, tuple(sorted(steps)), self.branches
        )
        return Records((kinds,))

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The CFG branches that are recorded and injected, each from the identity's own branch."""
        return BRANCHES if self.config.branches == "both" else ("cond",)

    @property
    def injected_steps(self) -> range:
        """The steps at which keys and values are injected."""
        return range(*self.config.inject_steps)

    def injects_at(self, site: AttentionSite) -> bool:
        """Whether the layer and the branch of a site are injected."""
        return site.layer in self.config.vital_layers and site.branch in self.branches

    @property
    def observed_at(self) -> int:
        """The mask step."""
        return self.config.mask_step

    @property
    def matching(self) -> Matching:
        """What is matched."""
        return Matching(self.config.match_layers, self.config.match_within)

    @property
    def mask_words(self) -> MaskWords:
        """Which words of a segment stand for it in masks."""
        return self.config.mask_words

    @property
    def shows(self) -> frozenset[Overlay]:
        """Masks and matches."""
        return frozenset({"mask", "match"})

    @property
    def lines(self) -> Mapping[str, str]:
        """What a plan says of it, by a label."""
        config = self.config
        first, last = config.inject_steps
        pre_pass = (
            "injects the background" if config.pre_pass_injection == "background" else "plain"
        )
        more = f", then {config.pre_passes - 1} with injection" * (config.pre_passes > 1)
        return {
            "method": (
                f"{config.name}, profile {config.profile}: {config.branches} branches, steps "
                f"{first} to {last - 1}, mask at step {config.mask_step}"
            ),
            "pre-pass": pre_pass + more,
            "layers": ", ".join(map(str, config.vital_layers)),
        }

    def notes(self, facts: ModelFacts) -> Sequence[str]:
        """Return what a user must know of this method on this model."""
        if facts.has_rope:
            return ()
        return (
            f"{facts.name} has no rotary positions: keys of the identity character keep the place "
            f"where they were recorded, so a character that moves is held less well",
        )

    def runs(self, role: Role) -> tuple[Run, ...]:
        """Return the runs of a video: of a frame video pre-passes to the mask step, then it."""
        if role == "identity":
            return super().runs(role)
        config = self.config
        to_mask = tuple(range(config.mask_step + 1))
        plain = Run(to_mask)
        if config.pre_pass_injection == "background":
            plain = Run(to_mask, reads=reads_own(to_mask[1:]))  # by the mask of the step before
        repeated = reads_own([step for step in self.injected_steps if step <= config.mask_step])
        main = Run(tuple(range(self.num_steps)), reads=reads_own(self.injected_steps))
        return (plain, *[Run(to_mask, reads=repeated)] * (config.pre_passes - 1), main)

    def control(self, role: Role, number: int, given: RunInputs) -> RunControl:
        """Record an identity video; observe the first runs of a frame video; inject."""
        from bachvid.methods.controls import injecting, observing  # import torch

        config = self.config
        if role == "identity":
            return observing.IdentityRecorder(given, config, self.records, config.match_layers)
        if number == len(self.runs(role)) - 1:
            return injecting.FrameInjector(given, self)
        if number > 0:
            return injecting.RepeatedPrePass(given, self)
        if config.pre_pass_injection == "background":
            return injecting.PrePassInjector(given, self)
        return observing.VideoObserver(given, config, config.match_layers)


def _check_steps(config: ResolvedBachVid, sampling: ResolvedSampling) -> None:
    if config.inject_steps[1] > sampling.num_steps:
        raise ConfigError(
            f"method.inject_steps: is {list(config.inject_steps)}: it must end at "
            f"sampling.num_steps, {sampling.num_steps}, or before"
        )
    if config.pre_passes > 1 and config.inject_steps[0] > config.mask_step:
        raise ConfigError(
            f"method.pre_passes: is {config.pre_passes}: a pre-pass ends with method.mask_step "
            f"{config.mask_step}, before anything is injected (method.inject_steps "
            f"{list(config.inject_steps)}), so a second one would repeat the first; set it to 1"
        )
