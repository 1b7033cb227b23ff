"""Our denoising loop: guidance branches, pre-pass and restart, seeds.

It runs any VideoModel, step for step as the stock diffusers pipeline does: for the same inputs the
latents are bitwise the same. It keeps no state between calls. It knows no method and no Ray.
Shapes: B batch, F latent frames, T text tokens, C channels; the order of a latent's axes is the
model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.attention.control import AttentionControl
from bachvid.inputs.sections import SamplingConfig
from bachvid.layout.gangs import BRANCHES, Branch, cut_passes
from bachvid.models.base import VideoModel, attention_control
from bachvid.models.solvers import _build_solver


class Denoised(NamedTuple):
    """A step, the latents that it leaves, and what they are expected to become (x0 hat)."""

    step: int
    latents: Tensor
    estimate: Tensor


@torch.no_grad()
def denoise(
    model: VideoModel,
    run: RunContext,
    *,
    prompt_embeds: Tensor,
    negative_embeds: Tensor | None,
    noise: Tensor,
    noise_seed: int,
    sampling: SamplingConfig,
    control: AttentionControl | None = None,
    stop_after: int | None = None,
) -> Iterator[Denoised]:
    """Denoise `noise`, latents of B videos, and yield after each step.

    The last latents are the result. Closing the iterator ends the run. Every call starts afresh, so
    that a main run after a pre-pass is the run that it would have been without one.

    Args:
        model: its processors are restored when the run ends, fails or is closed.
        run: its step and branches are set before every forward.
        prompt_embeds: [B, T, C].
        negative_embeds: [B, T, C]; None only if guidance_scale <= 1, which means no guidance.
        noise: what `model.initial_noise(noise_seed, video)` gives, unless B > 1.
        noise_seed: a stochastic scheduler (DPM) goes on drawing from this seed's generator, behind
            the initial noise.
        sampling: complete, as `resolve_config` returns it.
        control: what a method does to attention; None leaves diffusers' own processors in place.
        stop_after: end a pre-pass at this step: the transformer runs on it, the scheduler does
            not, and what the transformer saw is yielded.
    """
    assert sampling.guidance_scale is not None
    is_guided = sampling.guidance_scale > 1
    embeds: dict[Branch, Tensor] = {"cond": prompt_embeds}
    if is_guided:
        assert negative_embeds is not None
        embeds["uncond"] = negative_embeds
    solver = _build_solver(model, noise, noise_seed=noise_seed, sampling=sampling)
    latents = estimate = noise
    with attention_control(model, run, control) if control else nullcontext():
        for step, timestep in enumerate(solver.timesteps):
            run.step = step
            predictions = _predict(model, run, latents, timestep, embeds)
            if step != stop_after:
                prediction = predictions["cond"]
                if is_guided:
                    uncond = predictions["uncond"]
                    prediction = uncond + sampling.guidance_scale * (prediction - uncond)
                advanced, estimate = solver.advance(step, prediction, latents)
                latents = advanced.to(noise.dtype)
            yield Denoised(step, latents, estimate.to(noise.dtype))
            if step == stop_after:
                break


def _predict(
    model: VideoModel,
    run: RunContext,
    latents: Tensor,
    timestep: Tensor,
    embeds: Mapping[Branch, Tensor],
) -> dict[Branch, Tensor]:
    """Run the transformer on all branches of a step, and give the prediction of each.

    As many forwards as the model's family has; a rank that shares guidance runs its own branch,
    and gets the other's prediction from another rank.
    """
    group = run.group
    is_shared = group.cfg_size > 1 and len(embeds) > 1
    own = (BRANCHES[group.cfg_rank],) if is_shared else tuple(embeds)
    predictions: dict[Branch, Tensor] = {}
    for branches in cut_passes(model.facts.passes, own):
        run.branches = branches
        batch = torch.cat([latents] * len(branches))
        joined = model.predict(batch, timestep, torch.cat([embeds[name] for name in branches]))
        predictions |= zip(branches, joined.chunk(len(branches)), strict=True)
    if is_shared:
        predictions = dict(zip(BRANCHES, group.gather_branches(predictions[own[0]]), strict=True))
    return predictions
