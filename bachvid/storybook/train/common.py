"""What every stage of training shares: its settings, its clips and its loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bachvid.storybook import model as storybook
from bachvid.storybook.world import ACTIONS, BACKGROUNDS, CHARACTERS, Difficulty, render_clip

_CHECKPOINT_SECONDS = 120.0
_HEAD_FROM = 0.60  # height of the chin in the rest pose, in figure heights


@dataclass(frozen=True, slots=True)
class Settings:
    """What every stage is given."""

    work: Path
    device: str
    minutes: float
    seed: int


@dataclass(frozen=True, slots=True)
class Clips:
    """Rendered clips: frames uint8 [N, F, H, W, 3], labels int64 [N, 3].

    mask and head, bool [N, F, H, W], are the character's pixels, and those of head and hat.
    """

    frames: Tensor
    mask: Tensor
    head: Tensor
    labels: Tensor

    def to(self, device: str) -> Clips:
        """Return the same clips on `device`."""
        return Clips(*(getattr(self, field.name).to(device) for field in fields(self)))


def clip_indices(seed: int) -> tuple[int, int, int]:
    """Return background, character and action of the training clip `seed`: all, in turn."""
    combination = seed % (len(BACKGROUNDS) * len(CHARACTERS) * len(ACTIONS))
    rest, action = divmod(combination, len(ACTIONS))
    return (*divmod(rest, len(CHARACTERS)), action)


def _render_range(first: int, last: int, difficulty: Difficulty) -> list[np.ndarray]:
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
    heads = [clip.mask & (np.nan_to_num(clip.rest[..., 1]) > _HEAD_FROM) for clip in clips]
    return [np.stack(x) for x in ([c.frames for c in clips], [c.mask for c in clips], heads)]


def render_clips(first: int, count: int, difficulty: Difficulty, workers: int = 2) -> Clips:
    """Render the clips of the seeds `first` to `first + count`."""
    edges = np.linspace(first, first + count, max(2, count // 200 + 1)).astype(int).tolist()
    with ProcessPoolExecutor(workers) as pool:
        parts = list(
            pool.map(_render_range, edges[:-1], edges[1:], [difficulty] * (len(edges) - 1))
        )
    frames, mask, head = (torch.from_numpy(np.concatenate(x)) for x in zip(*parts, strict=True))
    return Clips(
        frames,
        mask,
        head,
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
        sums: dict[str, Tensor] = {}
        counted = 0
        while self.step < steps:
            generator = torch.Generator(self.settings.device)
            generator.manual_seed(self.settings.seed * 1_000_003 + self.step)
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
                sums[name] = sums.get(name, 0.0) + value.detach()
            counted += 1
            now = time.monotonic()
            if self.step % 50 == 0:
                means = {name: round(float(value) / counted, 5) for name, value in sums.items()}
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
        state = self.module.state_dict()
        names = [name for name, value in state.items() if value.is_floating_point()]
        means, values = ([of[name] for name in names] for of in (self.average, state))
        torch._foreach_lerp_(means, values, 1 - decay)  # all in a few calls to the device


def warm_then_decay(step: int, *, warm: int, steps: int, decay_steps: int) -> float:
    """Return the learning-rate factor: linear warm-up, constant, linear to 2 % at the end."""
    down = 1.0 - 0.98 * max(0.0, (step - (steps - decay_steps)) / max(1, decay_steps))
    return min(1.0, (step + 1) / warm) * down
