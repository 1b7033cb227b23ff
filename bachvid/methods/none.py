"""The method `none`: what the model does by itself, observed as the others are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bachvid.attention.context import RunContext
from bachvid.kv.cache import IdentityCache, KVStore
from bachvid.methods.bachvid import IdentityRecorder, VideoObserver
from bachvid.methods.base import MethodSettings, Observation
from bachvid.prompts.tokenizer import TokenizedPrompt


class Vanilla:
    """Extracts masks at the mask step, so that an evaluation has them; changes no pixel."""

    def __init__(self, settings: MethodSettings, *, config_hash: str) -> None:
        self._settings = replace(settings, vital_layers=(), match_layers=(), recorded_steps=())
        self._config_hash = config_hash

    @property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """Nothing is read, in one run."""
        return self._settings.reads

    def identity_control(
        self, run: RunContext, prompt: TokenizedPrompt, store: KVStore, *, steps: Sequence[int]
    ) -> IdentityRecorder:
        """Observe an identity video; nothing is put into `store`."""
        return IdentityRecorder(
            run, prompt, self._settings, store=store, steps=steps, config_hash=self._config_hash
        )

    def pre_pass_control(
        self,
        run: RunContext,
        prompt: TokenizedPrompt,
        cache: IdentityCache | None,
        observation: Observation | None = None,
    ) -> VideoObserver:
        """Observe; never called, because there is one run only."""
        return VideoObserver(run, prompt, self._settings)

    def frame_control(
        self,
        run: RunContext,
        prompt: TokenizedPrompt,
        cache: IdentityCache,
        observation: Observation | None,
    ) -> VideoObserver:
        """Observe a frame video."""
        return VideoObserver(run, prompt, self._settings)
