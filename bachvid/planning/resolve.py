"""A config with every value filled in, checked against its model."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from bachvid.errors import ConfigError
from bachvid.inputs.strict_yaml import quote
from bachvid.inputs.words import clean_text

if TYPE_CHECKING:
    from bachvid.catalog.facts import ModelFacts
    from bachvid.catalog.profiles import ProfileFacts

from bachvid.inputs.config import MethodConfig, RenderConfig, SamplingConfig, SectionT

INDECISIVE = ("output", "cache", "cluster", "parallel")  # sections that do not decide the pixels


def resolve_config(config: RenderConfig, facts: ModelFacts) -> RenderConfig:
    """Fill what is None from the model and its profile, and check all of it against the model.

    The result has no None in video, sampling, method and output.fps. Raises ConfigError.
    """
    defaults = facts.defaults
    model = _filled(config.model, dtype=defaults.dtype)
    video = _filled(
        config.video,
        pixel_frames=defaults.pixel_frames,
        height=defaults.height,
        width=defaults.width,
    )
    assert video.pixel_frames is not None
    assert video.height is not None
    assert video.width is not None
    facts.grid(video.pixel_frames, video.height, video.width)
    sampling = _filled(
        config.sampling,
        scheduler=defaults.scheduler,
        num_steps=defaults.num_steps,
        guidance_scale=defaults.guidance_scale,
        noise=defaults.noise,
    )
    if facts.cleans_text:
        negative = clean_text(sampling.negative_prompt)
        sampling = sampling.model_copy(update={"negative_prompt": negative})
    assert sampling.num_steps
    if sampling.scheduler not in facts.schedulers:
        raise ConfigError(
            f"sampling.scheduler: is {quote(sampling.scheduler)}: {facts.name} is of the family "
            f"{facts.family}, which has {' and '.join(facts.schedulers)}"
        )
    method = _resolve_method(config.method, facts.profiles[config.method.profile], sampling)
    _check_method(method, facts, num_steps=sampling.num_steps)
    return RenderConfig(
        model=model,
        video=video,
        sampling=sampling,
        method=method,
        output=_filled(config.output, fps=defaults.fps),
        cache=config.cache,
        cluster=config.cluster,
        parallel=config.parallel,
    )


def config_hash(resolved: RenderConfig) -> str:
    """Return the SHA-256, in hex, of what decides the pixels: not where, how or to what files."""
    decisive = resolved.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(INDECISIVE, True),
            "model": {"device", "threads", "offload"},
            "method": {"profile"},
        },
    )
    canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _filled(section: SectionT, **defaults: object) -> SectionT:
    missing = {key: value for key, value in defaults.items() if getattr(section, key) is None}
    return section.model_copy(update=missing)


def _resolve_method(
    method: MethodConfig, profile: ProfileFacts, sampling: SamplingConfig
) -> MethodConfig:
    steps = sampling.num_steps
    assert steps is not None
    first, last = (round(fraction * steps) for fraction in profile.inject_fraction)
    return _filled(
        method,
        vital_layers=profile.vital_layers,
        mask_layers=profile.mask_layers,
        match_layers=profile.match_layers,
        mask_step=min(round(profile.mask_fraction * steps), steps - 1),
        inject_steps=(first, max(last, first + 1)),
        branches=profile.branches,
        pre_passes=profile.pre_passes,
        pre_pass_injection=profile.pre_pass_injection,
        match_threshold=profile.match_threshold,
        mask_softmax=profile.mask_softmax,
        mask_words=profile.mask_words,
        match_within=profile.match_within,
    )


def _check_method(method: MethodConfig, facts: ModelFacts, *, num_steps: int) -> None:
    for key in ("vital_layers", "mask_layers", "match_layers"):
        layers: tuple[int, ...] = getattr(method, key)
        if layers[-1] >= facts.num_layers:
            raise ConfigError(
                f"method.{key}: has layer {layers[-1]}: {facts.name} has {facts.num_layers} "
                f"layers, 0 to {facts.num_layers - 1}"
            )
    assert method.mask_step is not None
    assert method.inject_steps is not None
    if method.mask_step >= num_steps:
        raise ConfigError(
            f"method.mask_step: is {method.mask_step}: with sampling.num_steps {num_steps} "
            f"the last step is {num_steps - 1}"
        )
    if method.inject_steps[1] > num_steps:
        raise ConfigError(
            f"method.inject_steps: is {list(method.inject_steps)}: it must end at "
            f"sampling.num_steps, {num_steps}, or before"
        )
    assert method.pre_passes is not None
    if method.pre_passes > 1 and method.inject_steps[0] > method.mask_step:
        raise ConfigError(
            f"method.pre_passes: is {method.pre_passes}: a pre-pass ends with method.mask_step "
            f"{method.mask_step}, before anything is injected (method.inject_steps "
            f"{list(method.inject_steps)}), so a second one would repeat the first; set it to 1"
        )
