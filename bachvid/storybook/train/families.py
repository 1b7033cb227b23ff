"""What differs between the embedded models in training: their parts, their noise, their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bachvid.storybook import model as storybook
from bachvid.storybook import wan
from bachvid.storybook.train import wan as train_wan
from bachvid.storybook.train.common import Clips, Settings
from bachvid.storybook.train.transformer import (
    Latents,
    Noised,
    TextToVideo,
    Trainee,
    cogvideox_noised,
)
from bachvid.storybook.train.vae import train_vae


@dataclass(frozen=True, slots=True)
class TrainedFamily:
    """One embedded model in training.

    suffix: of its checkpoints, behind the name of the stage.
    build_vae: takes the deviation of the latents, by which a pipeline divides them.
    train_vae: is given the clips, and what loads their latents.
    save: writes a diffusers folder; takes vae, transformer and text_encoder by name.
    """

    suffix: str
    weights: Path
    build_vae: Callable[[float], nn.Module]
    build_text_to_video: Callable[[], Trainee]
    noised: Noised
    only_nouns: bool
    train_vae: Callable[[Clips, Callable[[], Latents], Settings, int], bool]
    save: Callable[..., Any]

    def checkpoint(self, work: Path, name: str) -> Path:
        """Return the path of the checkpoint of a stage."""
        return work / f"{name}{self.suffix}.pt"


def _build_cogvideox_vae(deviation: float) -> nn.Module:
    vae = storybook.build_vae()
    vae.register_to_config(scaling_factor=1 / deviation)
    module: nn.Module = vae
    return module


FAMILIES: Mapping[str, TrainedFamily] = {
    "cogvideox": TrainedFamily(
        suffix="",
        weights=storybook.WEIGHTS,
        build_vae=_build_cogvideox_vae,
        build_text_to_video=TextToVideo,
        noised=cogvideox_noised,
        only_nouns=False,
        train_vae=lambda clips, latents, settings, steps: train_vae(clips, settings, steps),
        save=storybook.save_storybook,
    ),
    "wan": TrainedFamily(
        suffix="-wan",
        weights=wan.WEIGHTS,
        build_vae=wan.build_vae,
        build_text_to_video=train_wan.WanTextToVideo,
        noised=train_wan.flow,
        only_nouns=True,
        train_vae=lambda clips, latents, settings, steps: train_wan.train_vae(
            clips, latents().latent, settings, steps
        ),
        save=wan.save_storybook,
    ),
}
