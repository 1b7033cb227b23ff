"""Our denoising loop: guidance branches, pre-pass and restart, seeds.

It runs any VideoModel, step for step as the stock diffusers pipeline does: for the same inputs the
latents are bitwise the same. It keeps no state between calls. It knows no method and no Ray.
Shapes: B batch, F latent frames, T text tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from diffusers import CogVideoXDPMScheduler
from torch import Tensor

from bachvid.attention import AttentionControl, RunContext
from bachvid.config import SamplingConfig
from bachvid.models.base import Scheduler, VideoModel, attention_control


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
    """Denoise `noise` [B, F, C, height, width], and yield after each step.

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
    assert sampling.num_steps is not None
    assert sampling.guidance_scale is not None
    is_guided = sampling.guidance_scale > 1
    if is_guided:
        assert negative_embeds is not None
        prompt_embeds = torch.cat([negative_embeds, prompt_embeds])
    run.branches = ("uncond", "cond") if is_guided else ("cond",)
    solver = _build_solver(model, noise, noise_seed=noise_seed, sampling=sampling)
    latents = estimate = noise
    with attention_control(model, run, control) if control else nullcontext():
        for step, timestep in enumerate(solver.timesteps):
            run.step = step
            batch = torch.cat([latents, latents]) if is_guided else latents
            prediction = model.predict(batch, timestep, prompt_embeds).float()
            if step != stop_after:
                if is_guided:
                    uncond, cond = prediction.chunk(2)
                    prediction = uncond + sampling.guidance_scale * (cond - uncond)
                advanced, estimate = solver.advance(step, prediction, latents)
                latents = advanced.to(noise.dtype)
            yield Denoised(step, latents, estimate.to(noise.dtype))
            if step == stop_after:
                break


class _Solver(Protocol):
    """A scheduler with the state of one run."""

    timesteps: Tensor

    def advance(
        self, step: int, prediction: Tensor, latents: Tensor
    ) -> tuple[Tensor, Tensor]: ...  # latents of the next step, and the estimate of x0


class _Ddim:
    """A solver that needs neither noise nor memory."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.timesteps = scheduler.timesteps
        self._scheduler = scheduler

    def advance(self, step: int, prediction: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        timestep = self.timesteps[step]
        latents, estimate = self._scheduler.step(prediction, timestep, latents, return_dict=False)
        return latents, estimate


class _Dpm:
    """DPM-Solver++ (SDE): draws noise at every step and remembers its last estimate of x0."""

    def __init__(self, scheduler: Scheduler, generator: torch.Generator) -> None:
        self.timesteps = scheduler.timesteps
        self._scheduler = scheduler
        self._generator = generator
        self._estimate: Tensor | None = None

    def advance(self, step: int, prediction: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        latents, estimate = self._scheduler.step(
            prediction,
            self._estimate,
            self.timesteps[step],
            self.timesteps[step - 1] if step > 0 else None,
            latents,
            generator=self._generator,
            return_dict=False,
        )
        self._estimate = estimate
        return latents, estimate


def _build_solver(
    model: VideoModel, noise: Tensor, *, noise_seed: int, sampling: SamplingConfig
) -> _Solver:
    assert sampling.scheduler is not None
    assert sampling.num_steps is not None
    scheduler = model.scheduler(sampling.scheduler)
    scheduler.set_timesteps(sampling.num_steps, device=model.device)
    if not isinstance(scheduler, CogVideoXDPMScheduler):
        return _Ddim(scheduler)
    generator = torch.Generator().manual_seed(noise_seed)
    # The stock pipeline draws the initial noise from the same generator: draw past it.
    torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
    return _Dpm(scheduler, generator)
