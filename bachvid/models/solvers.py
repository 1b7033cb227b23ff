"""Solvers: diffusers' schedulers, each with the state of one run.

They turn a prediction into the latents of the next step.

A solver takes a fresh scheduler whose timesteps are set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )


class Solver(Protocol):
    """Steps count from 0; latents and predictions are in the model's own layout."""

    timesteps: Tensor  # one for each step

    def advance(self, step: int, prediction: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents after `step`, and what they are expected to become (x0 hat).

        Called once for every step, in rising order: a solver may remember what was predicted.
        """

    def estimate(self, step: int, prediction: Tensor, latents: Tensor) -> Tensor:
        """Return the same x0 hat as `advance` does, bitwise, without advancing."""

    def noised(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """Return finished latents with as much of `noise` as latents have before `step`."""


class DdimSolver:
    """A solver that needs neither noise nor memory."""

    def __init__(self, scheduler: CogVideoXDDIMScheduler) -> None:
        self.timesteps: Tensor = scheduler.timesteps
        self._scheduler = scheduler

    def advance(self, step: int, prediction: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next latents and x0 hat."""
        timestep = self.timesteps[step]
        latents, estimate = self._scheduler.step(prediction, timestep, latents, return_dict=False)
        return latents, estimate

    def estimate(self, step: int, prediction: Tensor, latents: Tensor) -> Tensor:
        """Return x0 hat."""
        return self.advance(step, prediction, latents)[1]

    def noised(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """Return `clean` noised on the scheduler's own curve."""
        return _add_noise(self._scheduler, clean, noise, self.timesteps[step])


class DpmSolver:
    """DPM-Solver++ (SDE): draws noise at every step and remembers its last estimate of x0."""

    def __init__(self, scheduler: CogVideoXDPMScheduler, generator: torch.Generator) -> None:
        self.timesteps: Tensor = scheduler.timesteps
        self._scheduler = scheduler
        self._generator = generator
        self._estimate: Tensor | None = None

    def advance(self, step: int, prediction: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next latents, with new noise in them, and x0 hat."""
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

    def estimate(self, step: int, prediction: Tensor, latents: Tensor) -> Tensor:
        """Return x0 hat from a step whose noise is unused: the scheduler offers no other way."""
        unused = torch.Generator()
        estimate: Tensor = self._scheduler.step(
            prediction,
            None,
            self.timesteps[step],
            None,
            latents,
            generator=unused,
            return_dict=False,
        )[1]
        return estimate

    def noised(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """Return `clean` noised on the scheduler's own curve."""
        return _add_noise(self._scheduler, clean, noise, self.timesteps[step])


class FlowSolver:
    """UniPC or Euler on the straight line from noise to video; the model predicts its direction."""

    def __init__(
        self, scheduler: UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler
    ) -> None:
        # Else a first timestep that stands twice in the list would be taken for its second place.
        scheduler.set_begin_index(0)
        self.timesteps: Tensor = scheduler.timesteps
        self._scheduler = scheduler

    def advance(self, step: int, prediction: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next latents and x0 hat."""
        estimate = self.estimate(step, prediction, latents)
        timestep = self.timesteps[step]
        (latents,) = self._scheduler.step(prediction, timestep, latents, return_dict=False)
        return latents, estimate

    def estimate(self, step: int, prediction: Tensor, latents: Tensor) -> Tensor:
        """Return x0 hat: the end of the line on which the latents lie."""
        return latents - self._sigma(step) * prediction.float()

    def noised(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """Return the point of the line from `clean` to `noise` at the step's sigma."""
        sigma = self._sigma(step)
        return (1 - sigma) * clean + sigma * noise

    def _sigma(self, step: int) -> Tensor:
        sigma: Tensor = self._scheduler.sigmas[step]
        return sigma


def _add_noise(
    scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
) -> Tensor:
    noised: Tensor = scheduler.add_noise(clean, noise, timestep[None])
    return noised
