"""BachVid: foreground and background of a frame video see the keys of an identity video.

Source: BachVid (arXiv 2510.21696v1). What the paper leaves open is a config key; the values and
their reasons stand with the profiles. Shape suffixes: see `bachvid.attention.attend`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionSite, KVGroup
from bachvid.errors import CacheMissError, LayoutError, WorkerError
from bachvid.kv.cache import IdentityCache, KVShard, KVStore
from bachvid.layout.gangs import Branch
from bachvid.methods.base import IdentityControl, MethodControl, MethodSettings, Observation
from bachvid.methods.ops.injection import InjectedTokens, inject_identity_kv, select_injected_tokens
from bachvid.methods.ops.masks import ForegroundMask, extract_foreground_mask, text_mass
from bachvid.methods.ops.matching import TokenMatch, match_tokens, match_within_foreground
from bachvid.prompts.tokenizer import TokenizedPrompt

logger = logging.getLogger(__name__)


class VideoObserver(MethodControl):
    """Extracts the mask and keeps the features of a video; changes nothing.

    The conditional branch is looked at, at the mask step, or at every step up to it. Every rank
    of a group gets the mask of the whole video, and the features of its own positions.
    """

    def __init__(
        self,
        run: RunContext,
        prompt: TokenizedPrompt,
        settings: MethodSettings,
        *,
        every_step: bool = False,
    ) -> None:
        self.run, self.prompt, self.settings = run, prompt, settings
        self._mask_steps = range(0 if every_step else settings.mask_step, settings.mask_step + 1)
        self._masses: dict[int, Tensor] = {}
        self._features: dict[int, Tensor] = {}
        self.masks: dict[int, ForegroundMask] = {}  # by step

    @property
    def observation(self) -> Observation:
        """What was seen of the video. Raises WorkerError before the mask step is over."""
        step, layers = self.settings.mask_step, self.settings.match_layers
        if step not in self.masks or len(self._features) < len(layers):
            raise WorkerError(
                f"no mask and features yet: the run must go through step {step}, and its model "
                f"through the layers {sorted({*self.settings.mask_layers, *layers})}"
            )
        recoveries = (mask.recovery for _, mask in sorted(self.masks.items()))
        return Observation(
            self.masks[step], self._features, tuple(found for found in recoveries if found)
        )

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        """Add the text mass of a mask layer, where the text is in the joint sequence."""
        layout, rotary = self.run.layout, self.run.rotary
        if not layout.text_tokens or not self._looks_for_mask(site):
            return qkv
        _check_one_video(qkv.query_BSHD)
        if self.settings.mask_softmax == "joint":
            key_BKHD = rotary.rotate_joint(qkv.key_BSHD, layout)
        else:
            key_BKHD = self._words(qkv.key_BSHD)
        query_BNHD = rotary.rotate(qkv.query_BSHD[:, layout.video_rows])
        mass_NG = text_mass(query_BNHD[0], key_BKHD[0], self._segments)
        group = self.run.group
        self._add_mass(site, group.sum(mass_NG) / group.size)  # the mean over all heads
        return qkv

    def cross(self, site: AttentionSite, query_BSHD: Tensor, key_BTHD: Tensor) -> None:
        """Add the text mass of a mask layer, where the text has an attention of its own."""
        if not self._looks_for_mask(site):
            return
        _check_one_video(query_BSHD)
        is_joint = self.settings.mask_softmax == "joint"
        key_BKHD = key_BTHD if is_joint else self._words(key_BTHD)
        mass_NG = text_mass(query_BSHD[0], key_BKHD[0], self._segments)
        self._add_mass(site, self.run.gather_positions(mass_NG))

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        """Keep this rank's video rows of the match layers at the mask step, in host memory."""
        settings = self.settings
        wanted = site.layer in settings.match_layers and site.step == settings.mask_step
        if self._looks_at(site.branch) and wanted:
            rows_NC = out_BSC[0, self.run.layout.text_tokens :].clone()
            # All layers would take a tenth of what a GPU needs for a video, up to its end.
            self._features[site.layer] = self.run.group.from_cond(rows_NC).cpu()
        return out_BSC

    @property
    def _segments(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.prompt.rows["background"], self.prompt.rows["character"]

    def _words(self, key_BTHD: Tensor) -> Tensor:
        """Without the end token: it collects attention that belongs to no word."""
        return key_BTHD[:, : self.prompt.num_tokens - 1]

    def _looks_at(self, branch: Branch) -> bool:
        """Whether this branch is the conditional one, or this rank's own: it gets the other's."""
        return branch == "cond" or self.run.group.cfg_size > 1

    def _looks_for_mask(self, site: AttentionSite) -> bool:
        is_wanted = site.layer in self.settings.mask_layers and site.step in self._mask_steps
        return is_wanted and self._looks_at(site.branch)

    def _add_mass(self, site: AttentionSite, mass_NG: Tensor) -> None:
        """Keep a layer's mass; the last layer completes the step's mask."""
        layers = self.settings.mask_layers
        self._masses[site.layer] = self.run.group.from_cond(mass_NG)
        if site.layer != layers[-1]:  # they are in rising order
            return
        # An early mask only steers the pre-pass: on_empty_mask speaks of the final one.
        final = site.step == self.settings.mask_step
        self.masks[site.step] = extract_foreground_mask(
            [self._masses[layer] for layer in layers],
            self.run.layout,
            step=site.step,
            morphology=self.settings.morphology,
            on_empty=self.settings.on_empty_mask if final else "adapt",
        )


def _check_one_video(query_BSHD: Tensor) -> None:
    if len(query_BSHD) != 1:
        raise LayoutError(
            f"{len(query_BSHD)} videos in one batch: masks and matches are of one video; render "
            f"one video at a time"
        )


class IdentityRecorder(VideoObserver, IdentityControl):
    """Records the keys and values of the vital layers of an identity video; changes nothing."""

    def __init__(
        self,
        run: RunContext,
        prompt: TokenizedPrompt,
        settings: MethodSettings,
        *,
        store: KVStore,
        steps: Sequence[int],
        config_hash: str,
    ) -> None:
        super().__init__(run, prompt, settings)
        self._store, self._steps, self._config_hash = store, frozenset(steps), config_hash

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        """Put a copy of this site's video rows into the store, then look for the mask."""
        settings = self.settings
        if (
            site.layer in settings.vital_layers
            and site.step in self._steps
            and site.branch in settings.branches
        ):
            # Copies: a slice would keep the queries' memory, and the text's, alive.
            rows = self.run.layout.video_rows
            key_BMHD, value_BMHD = qkv.key_BSHD[:, rows], qkv.value_BSHD[:, rows]
            self._store.put(KVShard(site, key_BMHD.clone(), value_BMHD.clone()))
        return super().before(site, qkv)

    def cache(self, seed: int) -> IdentityCache:
        """Return what was recorded, with the features of all ranks: all of them must ask.

        Raises WorkerError before the mask step is over.
        """
        seen, settings = self.observation, self.settings
        device = seen.foreground.mask_N.device
        return IdentityCache(
            layout=self.run.layout,
            steps=settings.recorded_steps,
            layers=settings.vital_layers,
            branches=settings.branches,
            foreground_mask_N=seen.foreground.mask_N.cpu(),
            features={
                layer: self.run.gather_positions(x_NC.to(device)).cpu()
                for layer, x_NC in seen.features.items()
            },
            seed=seed,
            config_hash=self._config_hash,
            store=self._store,
        )


class PrePassInjector(VideoObserver):
    """Observes a pre-pass and, from step 1, injects background by the previous step's mask.

    Source: CharaConsist (arXiv 2507.11533), released code; the time law of BachVid's Table 4
    speaks for it.
    """

    def __init__(
        self,
        run: RunContext,
        prompt: TokenizedPrompt,
        settings: MethodSettings,
        *,
        cache: IdentityCache,
    ) -> None:
        super().__init__(run, prompt, settings, every_step=True)
        self._cache = cache
        self._tokens: dict[int, InjectedTokens] = {}  # by the step whose mask they are of

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        """Return background queries the identity's background keys."""
        settings = self.settings
        if (
            site.layer not in settings.vital_layers
            or site.branch not in settings.branches
            or not 1 <= site.step <= settings.mask_step
        ):
            return ()
        return inject_identity_kv(self._cache.store.get(site), self._background(site.step - 1))

    def _background(self, step: int) -> InjectedTokens:
        if step not in self._tokens:
            self._tokens[step] = select_injected_tokens(
                self.masks[step].mask_N,
                self._cache.foreground_mask_N,
                None,
                self.run.layout,
                threshold=self.settings.match_threshold,
            )
        return self._tokens[step]


class FrameInjector(MethodControl):
    """Injects the identity's keys and values into a frame video whose pre-pass was observed."""

    def __init__(
        self,
        run: RunContext,
        settings: MethodSettings,
        *,
        cache: IdentityCache,
        observation: Observation,
    ) -> None:
        self._run, self._settings = run, settings
        self._cache, self._observation = cache, observation
        frame_mask_N = observation.foreground.mask_N
        self._injected = select_injected_tokens(
            frame_mask_N,
            cache.foreground_mask_N,
            self._match(frame_mask_N),
            run.layout,
            threshold=settings.match_threshold,
        )

    @property
    def observation(self) -> Observation:
        """What the pre-pass saw of this video."""
        return self._observation

    @property
    def injected(self) -> InjectedTokens:
        """The tokens that see identity keys."""
        return self._injected

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        """Return foreground and background queries the identity keys that they see."""
        settings = self._settings
        first, last = settings.inject_steps
        if (
            site.layer not in settings.vital_layers
            or site.branch not in settings.branches
            or not first <= site.step < last
        ):
            return ()
        return inject_identity_kv(self._cache.store.get(site), self._injected)

    def _match(self, frame_mask_N: Tensor) -> TokenMatch:
        """Match this rank's foreground tokens, and put together what all ranks found."""
        run, layers = self._run, self._settings.match_layers
        own_mask_N = frame_mask_N[run.positions]
        features = self._observation.features
        frame = [features[layer][own_mask_N.cpu()].to(own_mask_N.device) for layer in layers]
        identity = [self._cache.features[layer] for layer in layers]
        if self._settings.match_within == "video":
            match = match_tokens(frame, identity)
        else:
            match = match_within_foreground(
                frame, identity, self._cache.foreground_mask_N, sum_frame=run.group.sum
            )
        if run.group.size == 1:
            return match
        found = []
        for x_Q in match:
            x_N1 = x_Q.new_zeros(len(own_mask_N), 1)
            x_N1[own_mask_N, 0] = x_Q
            found.append(run.gather_positions(x_N1)[frame_mask_N, 0])
        return TokenMatch(*found)


class RepeatedPrePass(VideoObserver):
    """Observes a pre-pass that injects what the pre-pass before it found.

    Not in the paper: the character of a plain pre-pass is another one than that of the main run,
    and so are its mask and its matches. This one's is already like the identity's.
    """

    def __init__(
        self,
        run: RunContext,
        prompt: TokenizedPrompt,
        settings: MethodSettings,
        *,
        cache: IdentityCache,
        observation: Observation,
    ) -> None:
        super().__init__(run, prompt, settings)
        self._injector = FrameInjector(run, settings, cache=cache, observation=observation)
        self._earlier = observation.recoveries

    @property
    def observation(self) -> Observation:
        """What was seen of the video, with the recoveries of the pre-passes before."""
        seen = super().observation
        return replace(seen, recoveries=self._earlier + seen.recoveries)

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        """Return foreground and background queries the identity keys that they see."""
        return self._injector.extra(site, qkv)


class BachVid:
    """The method of the paper, as one object for all scenes of a render."""

    def __init__(self, settings: MethodSettings, *, config_hash: str) -> None:
        self._settings, self._config_hash = settings, config_hash
        self._has_warned = False

    @property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """The steps whose identity keys and values each run of a frame video reads."""
        return self._settings.reads

    def identity_control(
        self, run: RunContext, prompt: TokenizedPrompt, store: KVStore, *, steps: Sequence[int]
    ) -> IdentityRecorder:
        """Record an identity video into `store`."""
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
        """Observe the first steps of a frame video; with injection, if configured or repeated."""
        if observation is not None:
            assert cache is not None
            self._check(run, cache)
            return RepeatedPrePass(
                run, prompt, self._settings, cache=cache, observation=observation
            )
        if self._settings.pre_pass_injection == "none":
            return VideoObserver(run, prompt, self._settings)
        if cache is None:
            raise CacheMissError(
                "the pre-pass has no identity cache: method.pre_pass_injection is background, so "
                "render the identity video first, or set method.pre_pass_injection=none"
            )
        self._check(run, cache)
        return PrePassInjector(run, prompt, self._settings, cache=cache)

    def frame_control(
        self,
        run: RunContext,
        prompt: TokenizedPrompt,
        cache: IdentityCache,
        observation: Observation | None,
    ) -> FrameInjector:
        """Inject into a frame video; `observation` is that of its last pre-pass."""
        assert observation is not None
        self._check(run, cache)
        if run.rotary.is_none and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the model has no rotary embedding: its keys carry their position inside, so "
                "foreground keys of the identity video cannot move to where the frame video needs "
                "them (BachVid Eq. 12); expect a weaker character than with CogVideoX-5b"
            )
        return FrameInjector(run, self._settings, cache=cache, observation=observation)

    def _check(self, run: RunContext, cache: IdentityCache) -> None:
        settings = self._settings
        cache.check(
            run.layout,
            steps=settings.recorded_steps,
            layers=settings.vital_layers,
            branches=settings.branches,
            match_layers=settings.match_layers,
            config_hash=self._config_hash,
        )
