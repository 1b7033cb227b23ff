"""What every stage of training shares: its settings, its clips and its loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bachvid.storybook import model as storybook
from bachvid.storybook.world import ACTIONS, BACKGROUNDS, CHARACTERS, Difficulty, render_clip

_CHECKPOINT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What every stage is given."""

    work: Path
    device: str
    minutes: float
    seed: int


@dataclass(frozen=True, slots=True)
class Clips:
    """Rendered clips: frames uint8 [N, F, H, W, 3], mask bool [N, F, H, W], labels int64 [N, 3]."""

    frames: Tensor
    mask: Tensor
    labels: Tensor


def clip_indices(seed: int) -> tuple[int, int, int]:
    """Return background, character and action of the training clip `seed`: all, in turn."""
    combination = seed % (len(BACKGROUNDS) * len(CHARACTERS) * len(ACTIONS))
    rest, action = divmod(combination, len(ACTIONS))
    return (*divmod(rest, len(CHARACTERS)), action)


def _render_range(first: int, last: int, difficulty: Difficulty) -> tuple[np.ndarray, np.ndarray]:
    clips = [
        render_clip(
            seed,
            *clip_indices(seed),
            size=storybook.FRAME_SIZE,
            num_frames=storybook.PIXEL_FRAMES,
            difficulty=difficulty,
        )
        for seed in range(first, last)
    ]
    return np.stack([clip.frames for clip in clips]), np.stack([clip.mask for clip in clips])


def render_clips(first: int, count: int, difficulty: Difficulty, workers: int = 2) -> Clips:
    """Render the clips of the seeds `first` to `first + count`."""
    edges = np.linspace(first, first + count, max(2, count // 200 + 1)).astype(int).tolist()
    with ProcessPoolExecutor(workers) as pool:
        parts = list(
            pool.map(_render_range, edges[:-1], edges[1:], [difficulty] * (len(edges) - 1))
        )
    return Clips(
        torch.from_numpy(np.concatenate([frames for frames, _ in parts])),
        torch.from_numpy(np.concatenate([mask for _, mask in parts])),
        torch.tensor([clip_indices(seed) for seed in range(first, first + count)]),
    )


def to_video(frames: Tensor) -> Tensor:
    """Return uint8 [N, F, H, W, 3] as float32 [N, 3, F, H, W] in -1..1."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


class Trainer:
    """Runs a stage's steps with checkpoints, logs and an average of the weights."""

    def __init__(
        self,
        settings: Settings,
        stage: str,
        module: nn.Module,
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        self.settings, self.stage = settings, stage
        self.module, self.optimizers = module, optimizers
        self.average = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
        self.step = 0
        self.path = settings.work / f"{stage}.pt"
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            module.load_state_dict(state["module"])
            if state["optimizers"] is not None:  # the stage `shipped` has none
                for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
            self.average = {k: v.to(self.average[k].device) for k, v in state["average"].items()}
            self.step = state["step"]

    def run(
        self,
        loss_at: Callable[[int, torch.Generator], dict[str, Tensor]],
        *,
        steps: int,
        rate_at: Callable[[int], float],
        average_decay: float,
        inspect: Callable[[int], None] | None = None,
        inspect_every: int = 500,
    ) -> bool:
        """Train up to `steps`, minimising "loss"; False if the minutes ended first."""
        started = saved = logged = time.monotonic()
        sums: dict[str, float] = {}
        counted = 0
        while self.step < steps:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
            losses = loss_at(self.step, generator)
            torch.autograd.backward(losses["loss"])
            nn.utils.clip_grad_norm_(self.module.parameters(), 2.0)
            for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * rate_at(self.step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self._average(min(average_decay, self.step / (self.step + 10)))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            counted += 1
            now = time.monotonic()
            if self.step % 50 == 0:
                means = {name: round(value / counted, 5) for name, value in sums.items()}
                self.log(step=self.step, seconds_per_step=(now - logged) / counted, **means)
                sums, counted, logged = {}, 0, now
            if inspect is not None and self.step % inspect_every == 0:
                inspect(self.step)
            if now - saved > _CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
            if now - started > 60 * self.settings.minutes:
                break
        self.save()
        return self.step >= steps

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        state = {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "step": self.step,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def log(self, **row: float | str) -> None:
        """Append a row to the log."""
        with (self.settings.work / "log.jsonl").open("a") as file:
            file.write(json.dumps({"stage": self.stage, "time": round(time.time()), **row}) + "\n")

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)


def warm_then_decay(step: int, *, warm: int, steps: int, decay_steps: int) -> float:
    """Return the learning-rate factor: linear warm-up, constant, linear to 2 % at the end."""
    down = 1.0 - 0.98 * max(0.0, (step - (steps - decay_steps)) / max(1, decay_steps))
    return min(1.0, (step + 1) / warm) * down
