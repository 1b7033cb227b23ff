"""Controls that let a frame video see the keys and values of its identity video.

Shape suffixes: see `bachvid.attention.control`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from bachvid.attention.control import QKV, KVGroup
from bachvid.kv.cache import SceneCache
from bachvid.layout.records import AttentionSite
from bachvid.methods.base import Observation, RunControl, RunInputs
from bachvid.methods.controls.observing import VideoObserver
from bachvid.methods.ops.injection import InjectedTokens, inject_identity_kv, select_injected_tokens
from bachvid.methods.ops.matching import TokenMatch, match_tokens, match_within_foreground

if TYPE_CHECKING:
    from bachvid.methods.bachvid import BachVid


class PrePassInjector(VideoObserver):
    """Observes a pre-pass and, from step 1, injects background according to the mask before.

    Source: CharaConsist (arXiv 2507.11533), released code. The times in BachVid's Table 4 suggest
    that BachVid does the same.
    """

    def __init__(self, given: RunInputs, method: BachVid) -> None:
        super().__init__(given, method.config, method.config.match_layers, every_step=True)
        self._scene = _scene_of(given)
        self._identity_mask_N = _identity_mask(self._scene)
        self._method = method
        self._steps = {read.step for read in given.run.reads}
        self._tokens: dict[int, InjectedTokens] = {}  # by the step whose mask they are of

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        """Return the identity's background keys for background queries."""
        if site.step not in self._steps or not self._method.injects_at(site):
            return ()
        return inject_identity_kv(self._scene.source.get(site), self._background(site.step - 1))

    def _background(self, step: int) -> InjectedTokens:
        if step not in self._tokens:
            self._tokens[step] = select_injected_tokens(
                self.masks[step].mask_N,
                self._identity_mask_N,
                None,
                self.context.layout,
                threshold=self._method.config.match_threshold,
            )
        return self._tokens[step]


class FrameInjector(RunControl):
    """Injects the identity's keys and values into a frame video whose pre-pass was observed."""

    def __init__(self, given: RunInputs, method: BachVid) -> None:
        self._context, self._method = given.context, method
        self._scene = _scene_of(given)
        self._steps = {read.step for read in given.run.reads}
        self._observation = given.earlier[-1]
        foreground = self._observation.foreground
        assert foreground is not None, "a pre-pass of this method takes a mask"
        self._injected = select_injected_tokens(
            foreground.mask_N,
            _identity_mask(self._scene),
            self._match(foreground.mask_N),
            given.context.layout,
            threshold=method.config.match_threshold,
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
        """Return the identity keys that foreground and background queries see."""
        if site.step not in self._steps or not self._method.injects_at(site):
            return ()
        return inject_identity_kv(self._scene.source.get(site), self._injected)

    def _match(self, frame_mask_N: Tensor) -> TokenMatch:
        """Match this rank's foreground tokens, and gather the matches of all ranks."""
        context, layers = self._context, self._method.config.match_layers
        own_mask_N = frame_mask_N[context.positions]
        features = self._observation.features
        frame = [features[layer][own_mask_N.cpu()].to(own_mask_N.device) for layer in layers]
        identity = [self._scene.manifest.features[layer] for layer in layers]
        if self._method.config.match_within == "video":
            match = match_tokens(frame, identity)
        else:
            match = match_within_foreground(
                frame, identity, _identity_mask(self._scene), sum_frame=context.group.sum
            )
        found = []
        for x_Q in match:
            x_N1 = x_Q.new_zeros(len(own_mask_N), 1)
            x_N1[own_mask_N, 0] = x_Q
            found.append(context.gather_positions(x_N1)[frame_mask_N, 0])
        return TokenMatch(*found)


class RepeatedPrePass(VideoObserver):
    """Observes a pre-pass that injects what the pre-pass before it found.

    Not in the paper. A plain pre-pass shows another character than the main run, so its mask and
    its matches are those of another figure. Here the character already resembles the identity's.
    """

    def __init__(self, given: RunInputs, method: BachVid) -> None:
        super().__init__(given, method.config, method.config.match_layers)
        self._injector = FrameInjector(given, method)
        self._earlier = given.earlier[-1].recoveries

    @property
    def observation(self) -> Observation | None:
        """What was seen of the video, with the recoveries of the pre-passes before."""
        seen = super().observation
        return seen and replace(seen, recoveries=self._earlier + seen.recoveries)

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        """Return the identity keys that foreground and background queries see."""
        return self._injector.extra(site, qkv)


def _scene_of(given: RunInputs) -> SceneCache:
    assert given.scene is not None, "a run that reads is given its scene"
    return given.scene


def _identity_mask(scene: SceneCache) -> Tensor:
    mask_N = scene.manifest.foreground_mask_N
    assert mask_N is not None, "an identity video of this method takes a mask"
    return mask_N
