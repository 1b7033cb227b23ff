"""How a prediction becomes the latents of the next step, as diffusers' schedulers do it."""

from __future__ import annotations

from typing import Protocol

import torch
from diffusers import (
    CogVideoXDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from bachvid.inputs.sections import SamplingConfig
from bachvid.models.base import Scheduler, VideoModel


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


class _Flow:
    """UniPC or Euler on the straight line between video and noise, whose direction is predicted."""

    def __init__(
        self, scheduler: UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler
    ) -> None:
        # Else a first timestep that stands twice in the list would be taken for its second place.
        scheduler.set_begin_index(0)
        self.timesteps = scheduler.timesteps
        self._scheduler = scheduler

    def advance(self, step: int, prediction: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        estimate = latents - self._scheduler.sigmas[step] * prediction.float()
        timestep = self.timesteps[step]
        (latents,) = self._scheduler.step(prediction, timestep, latents, return_dict=False)
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
    if isinstance(scheduler, UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler):
        return _Flow(scheduler)
    if not isinstance(scheduler, CogVideoXDPMScheduler):
        return _Ddim(scheduler)
    generator = torch.Generator().manual_seed(noise_seed)
    # The stock pipeline draws the initial noise from the same generator: draw past it.
    torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
    return _Dpm(scheduler, generator)
