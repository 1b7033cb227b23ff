"""The two loops over the steps of a run: `denoise` makes a video, `replay` revisits a finished one.

They work with any VideoModel. `denoise` follows the stock diffusers pipeline step for step: the
same inputs give bitwise the same latents. Both are iterators and keep nothing in the model between
two steps, so several of them can take turns in one process. They know no method and no Ray.
Shapes: B videos, F latent frames, T text tokens, C channels; the order of a latent's axes is the
model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.attention.control import AttentionControl, Denoised, Guided
from bachvid.inputs.sections import ResolvedSampling
from bachvid.layout.gangs import BRANCHES, Branch, cut_passes
from bachvid.methods.base import Run
from bachvid.models.base import VideoModel, attention_control


class Track(NamedTuple):
    """A finished video (`clean`), and its noised latents before each step."""

    clean: Tensor
    before: Callable[[int], Tensor]


def source_track(
    model: VideoModel, clean: Tensor, noise: Tensor, sampling: ResolvedSampling
) -> Track:
    """Return the track of finished latents, noised with `noise` to the level of each step."""
    solver = model.solver(sampling, noise, noise_seed=0)  # its draws are not used
    return Track(clean, lambda step: solver.noised(clean, noise, step).to(noise.dtype))


@torch.no_grad()
def denoise(
    model: VideoModel,
    context: RunContext,
    run: Run,
    *,
    prompt_embeds: Tensor,
    negative_embeds: Tensor | None,
    noise: Tensor,
    noise_seed: int,
    sampling: ResolvedSampling,
    control: AttentionControl | None = None,
) -> Iterator[Denoised]:
    """Denoise `noise`, latents of B videos, and yield after each step of `run`.

    The last latents are the result. Closing the iterator ends the run. Every call starts afresh: a
    pre-pass leaves no trace in the main run that follows.

    Args:
        model: the control is installed in its processors during the forwards of a step only.
        context: its step and branches are set before every forward.
        run: its steps begin with 0. If it ends before the schedule does, its last step runs the
            transformer but not the solver, because only what the control sees is wanted.
        prompt_embeds: [B, T, C].
        negative_embeds: [B, T, C]; unused without guidance, that is if guidance_scale <= 1.
        noise: what `model.initial_noise(noise_seed, video)` returns, unless B > 1.
        noise_seed: a stochastic solver (DPM) continues this seed's generator after the initial
            noise.
        sampling: the schedule and the guidance.
        control: the method's; None leaves diffusers' own processors in place.
    """
    assert run.steps == tuple(range(len(run.steps))), "a solver takes every step, from 0"
    embeds = _embeds_of_branches(prompt_embeds, negative_embeds, sampling)
    solver = model.solver(sampling, noise, noise_seed)
    guide = (control or AttentionControl()).guide
    is_whole = run.steps[-1] == sampling.num_steps - 1
    latents = estimate = noise
    for step in run.steps:
        predictions = _predict(model, context, step, latents, solver.timesteps, embeds, control)
        if is_whole or step != run.steps[-1]:
            predictions = _of_all_branches(context, predictions, embeds)
            predicted = Guided(
                step,
                cond=predictions["cond"],
                uncond=predictions.get("uncond"),
                scale=sampling.guidance_scale,
                latents=latents,
                estimate=partial(solver.estimate, step, latents=latents),
            )
            advanced, estimate = solver.advance(step, guide(predicted), latents)
            latents = advanced.to(noise.dtype)
        done = Denoised(step, latents, estimate.to(noise.dtype))
        if control is not None:
            control.stepped(done)
        yield done


@torch.no_grad()
def replay(
    model: VideoModel,
    context: RunContext,
    run: Run,
    *,
    prompt_embeds: Tensor,
    negative_embeds: Tensor | None,
    track: Track,
    sampling: ResolvedSampling,
    control: AttentionControl | None = None,
) -> Iterator[Denoised]:
    """Show the transformer a finished video, noised to each step of `run`, and yield after each.

    No solver runs: the latents come from the track, and the estimate is the video itself. The
    arguments are those of `denoise`, but `run` may have any steps.
    """
    embeds = _embeds_of_branches(prompt_embeds, negative_embeds, sampling)
    timesteps = model.solver(sampling, track.clean, noise_seed=0).timesteps
    for step in run.steps:
        latents = track.before(step)
        _predict(model, context, step, latents, timesteps, embeds, control)
        done = Denoised(step, latents, track.clean)
        if control is not None:
            control.stepped(done)
        yield done


def _embeds_of_branches(
    prompt_embeds: Tensor, negative_embeds: Tensor | None, sampling: ResolvedSampling
) -> dict[Branch, Tensor]:
    if sampling.guidance_scale <= 1:
        return {"cond": prompt_embeds}
    assert negative_embeds is not None, "guidance needs the embeddings of a negative prompt"
    return {"cond": prompt_embeds, "uncond": negative_embeds}


def _predict(
    model: VideoModel,
    context: RunContext,
    step: int,
    latents: Tensor,
    timesteps: Tensor,
    embeds: Mapping[Branch, Tensor],
    control: AttentionControl | None,
) -> dict[Branch, Tensor]:
    """Run the transformer on this rank's branches of a step, and return the prediction of each.

    One forward, or one for each branch, as the model's family has it. The control is installed
    for these forwards only, because another run of this process may take its turn in between.
    """
    context.step = step
    own = tuple(embeds)
    if _shares_branches(context, embeds):
        own = (BRANCHES[context.group.cfg_rank],)
    predictions: dict[Branch, Tensor] = {}
    with attention_control(model, context, control) if control is not None else nullcontext():
        for branches in cut_passes(model.facts.passes, own):
            context.branches = branches
            batch = torch.cat([latents] * len(branches))
            joined_embeds = torch.cat([embeds[name] for name in branches])
            joined = model.predict(batch, timesteps[step], joined_embeds)
            predictions |= zip(branches, joined.chunk(len(branches)), strict=True)
    return predictions


def _of_all_branches(
    context: RunContext, predictions: dict[Branch, Tensor], embeds: Mapping[Branch, Tensor]
) -> dict[Branch, Tensor]:
    """Return the predictions of all branches; ranks that share the branches exchange theirs."""
    if not _shares_branches(context, embeds):
        return predictions
    (own,) = predictions.values()
    return dict(zip(BRANCHES, context.group.gather_branches(own), strict=True))


def _shares_branches(context: RunContext, embeds: Mapping[Branch, Tensor]) -> bool:
    return context.group.cfg_size > 1 and len(embeds) > 1
