"""Fills in what a config leaves out, from its model and its method, and checks the result."""

from __future__ import annotations

from typing import Any

from bachvid.catalog.facts import ModelFacts
from bachvid.errors import ConfigError
from bachvid.inputs.sections import (
    ResolvedModel,
    ResolvedOutput,
    ResolvedSampling,
    ResolvedVideo,
    resolved_section,
)
from bachvid.inputs.strict_yaml import quote
from bachvid.inputs.words import clean_text
from bachvid.methods.base import Method
from bachvid.methods.registry import method_class
from bachvid.planning.config import RenderConfig, ResolvedConfig
from bachvid.units import join_words


def resolve_config(config: RenderConfig, facts: ModelFacts) -> ResolvedConfig:
    """Fill every None from the model and the method, and check all of it against the model.

    Raises ConfigError.
    """
    defaults = facts.defaults
    video = resolved_section(
        config.video,
        ResolvedVideo,
        pixel_frames=defaults.pixel_frames,
        height=defaults.height,
        width=defaults.width,
    )
    facts.grid(video.pixel_frames, video.height, video.width)
    sampling = resolved_section(
        config.sampling,
        ResolvedSampling,
        scheduler=defaults.scheduler,
        num_steps=defaults.num_steps,
        guidance_scale=defaults.guidance_scale,
        noise=defaults.noise,
    )
    if facts.cleans_text:
        negative = clean_text(sampling.negative_prompt)
        sampling = sampling.model_copy(update={"negative_prompt": negative})
    if sampling.scheduler not in facts.schedulers:
        raise ConfigError(
            f"sampling.scheduler: is {quote(sampling.scheduler)}: {facts.name} is of the family "
            f"{facts.family}, which has {join_words(facts.schedulers, 'and')}"
        )
    return ResolvedConfig(
        model=resolved_section(config.model, ResolvedModel, dtype=defaults.dtype),
        video=video,
        sampling=sampling,
        method=method_class(config.method.name).resolve(config.method, facts, sampling),
        output=resolved_section(config.output, ResolvedOutput, fps=defaults.fps),
        cache=config.cache,
        cluster=config.cluster,
        parallel=config.parallel,
    )


def build_method(config: ResolvedConfig) -> Method[Any]:
    """Return the method that a config names. Every process builds the same one."""
    method = method_class(config.method.name)
    return method(config.method, num_steps=config.sampling.num_steps)
