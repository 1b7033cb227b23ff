"""What a method is: three controls, one for each run that it has a hand in.

A method knows attention sites, tokens and prompt parts; no model, no worker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.attention.control import AttentionControl
from bachvid.inputs.config import MethodConfig
from bachvid.inputs.runs import read_steps, recorded_steps
from bachvid.kv.cache import IdentityCache, KVStore
from bachvid.layout.gangs import Branch
from bachvid.methods.ops.injection import InjectedTokens
from bachvid.methods.ops.masks import ForegroundMask, MaskRecovery
from bachvid.prompts.tokenizer import TokenizedPrompt


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """A resolved `MethodConfig`: no None left, the branches by name."""

    vital_layers: tuple[int, ...]
    mask_layers: tuple[int, ...]
    match_layers: tuple[int, ...]
    mask_step: int
    inject_steps: tuple[int, int]  # [first, last)
    reads: tuple[tuple[int, ...], ...]  # by each run of a frame video; the last is the main run
    recorded_steps: tuple[int, ...]
    branches: tuple[Branch, ...]
    pre_pass_injection: Literal["background", "none"]
    match_threshold: float
    mask_softmax: Literal["joint", "text"]
    match_within: Literal["video", "foreground"]
    morphology: bool
    on_empty_mask: Literal["adapt", "fail"]

    @classmethod
    def from_config(cls, config: MethodConfig) -> MethodSettings:
        """Narrow a config that `resolve_config` has filled."""
        assert config.vital_layers is not None
        assert config.mask_layers is not None
        assert config.match_layers is not None
        assert config.mask_step is not None
        assert config.inject_steps is not None
        assert config.pre_pass_injection is not None
        assert config.match_threshold is not None
        assert config.mask_softmax is not None
        assert config.match_within is not None
        return cls(
            vital_layers=config.vital_layers,
            mask_layers=config.mask_layers,
            match_layers=config.match_layers,
            mask_step=config.mask_step,
            inject_steps=config.inject_steps,
            reads=read_steps(config),
            recorded_steps=recorded_steps(config),
            branches=("uncond", "cond") if config.branches == "both" else ("cond",),
            pre_pass_injection=config.pre_pass_injection,
            match_threshold=config.match_threshold,
            mask_softmax=config.mask_softmax,
            match_within=config.match_within,
            morphology=config.morphology,
            on_empty_mask=config.on_empty_mask,
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """What a run showed of its video at the mask step.

    `features` are the attention outputs [N, C] of each match layer, in host memory; `recoveries`
    are those of all masks that the run used, in order.
    """

    foreground: ForegroundMask
    features: Mapping[int, Tensor]
    recoveries: tuple[MaskRecovery, ...]


class MethodControl(AttentionControl, ABC):
    """A control that can say, once its run is over, what it saw and injected."""

    @property
    @abstractmethod
    def observation(self) -> Observation:
        """What was seen of the video. Raises WorkerError before the mask step is over."""

    @property
    def injected(self) -> InjectedTokens | None:
        """The tokens that saw identity keys; None if the run injected nothing."""
        return None


class IdentityControl(MethodControl):
    """The control of an identity video."""

    @abstractmethod
    def cache(self, seed: int) -> IdentityCache:
        """Return what was recorded. Raises WorkerError before the mask step is over."""


class Method(Protocol):
    """What is done to the attention of identity and frame videos."""

    @property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """The steps whose identity keys and values each run of a frame video reads.

        All runs but the last, the main run, are pre-passes and end with the mask step.
        """

    def identity_control(
        self, run: RunContext, prompt: TokenizedPrompt, store: KVStore, *, steps: Sequence[int]
    ) -> IdentityControl:
        """Observe an identity video, and record into `store` what it shows at `steps`."""

    def pre_pass_control(
        self,
        run: RunContext,
        prompt: TokenizedPrompt,
        cache: IdentityCache | None,
        observation: Observation | None = None,
    ) -> MethodControl:
        """Observe the first steps of a frame video, up to the mask step.

        `cache` may be None where the pre-pass reads nothing; then it can overlap the identity
        run. `observation` is that of the pre-pass before; None: this is the first.
        Raises CacheMissError or LayoutError if the cache does not serve.
        """

    def frame_control(
        self,
        run: RunContext,
        prompt: TokenizedPrompt,
        cache: IdentityCache,
        observation: Observation | None,
    ) -> MethodControl:
        """Render a frame video, given what its last pre-pass observed.

        Raises CacheMissError or LayoutError if the cache does not serve.
        """
