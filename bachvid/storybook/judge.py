"""The judge: a small classifier of storybook clips, this world's CLIP-T and ArcFace.

It reads background, character, action and the attributes that a prompt leaves open, and finds the
foreground. It is trained on procedural clips only; it measures, and never steers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_model
from torch import Tensor, nn

from bachvid.errors import LayoutError
from bachvid.storybook.world import ACTIONS, ATTRIBUTES, BACKGROUNDS, CHARACTERS

FRAMES, SIZE = 9, 64  # the only clips that it can read
WEIGHTS = Path(__file__).parent / "weights" / "judge" / "model.safetensors"
# What is read from a clip: name -> values. The first three stand in the prompt.
QUESTIONS: Mapping[str, Sequence[str]] = {
    "background": BACKGROUNDS,
    "character": CHARACTERS,
    "action": ACTIONS,
    **ATTRIBUTES,
}


@dataclass(frozen=True, slots=True)
class JudgeReading:
    """What the judge reads from V clips; foreground is bool [V, F, H, W]."""

    background: list[str]
    character: list[str]
    action: list[str]
    attributes: dict[str, list[str]]
    foreground: NDArray[np.bool_]


class _Block(nn.Module):
    """A residual block of two 3x3 convolutions, the first with a stride."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)
        self.norms = nn.ModuleList([nn.GroupNorm(8, outputs) for _ in range(2)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = F.silu(self.norms[0](self.first(x_BCHW)))
        return F.silu(self.norms[1](self.second(hidden)) + self.skip(x_BCHW))


class JudgeNetwork(nn.Module):
    """A U-shaped network over the frames of a clip, stacked as channels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                _Block(3 * FRAMES, width),  # 64 x 64
                _Block(width, 2 * width, 2),
                _Block(2 * width, 3 * width, 2),
                _Block(3 * width, 4 * width, 2),  # 8 x 8
            ]
        )
        self.up = nn.ModuleList(
            [_Block(7 * width, 2 * width), _Block(4 * width, width), _Block(2 * width, width)]
        )
        self.mask = nn.Conv2d(width, FRAMES, 1)
        features = 2 * (3 + 4) * width  # mean and maximum of the two coarsest scales
        self.hidden = nn.Linear(features, 256)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(256, len(values)) for name, values in QUESTIONS.items()}
        )

    def forward(self, video_BCFHW: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return a question's logits [B, values], for every question, and mask logits [B, F, H, W].

        The video is in -1..1.
        """
        scales = [video_BCFHW.flatten(1, 2)]
        for block in self.down:
            scales.append(block(scales[-1]))
        pooled = torch.cat(
            [pool for x in scales[-2:] for pool in (x.mean((2, 3)), x.amax((2, 3)))], dim=1
        )
        hidden = F.silu(self.hidden(pooled))
        up = scales[-1]
        for block, skip in zip(self.up, reversed(scales[1:-1]), strict=True):
            up = block(torch.cat([F.interpolate(up, scale_factor=2.0), skip], dim=1))
        return {name: head(hidden) for name, head in self.heads.items()}, self.mask(up)


class Judge:
    """Reads clips with a trained network."""

    def __init__(self, network: JudgeNetwork) -> None:
        self._network = network.eval()

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Judge:
        """Load the judge that the package ships."""
        network = JudgeNetwork()
        load_model(network, path)
        return cls(network.float())

    @torch.no_grad()
    def __call__(self, frames: NDArray[np.uint8]) -> JudgeReading:
        """Read clips: uint8 [V, 9, 64, 64, 3]. Raises LayoutError for any other size."""
        if frames.shape[1:] != (FRAMES, SIZE, SIZE, 3):
            raise LayoutError(
                f"the judge got frames of shape {frames.shape}: it reads [V, {FRAMES}, {SIZE}, "
                f"{SIZE}, 3] only; render with the storybook model at its own size"
            )
        video = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        parts = [self._network(part) for part in torch.split(video, 64)]
        answers = {
            name: [values[i] for logits, _ in parts for i in logits[name].argmax(-1).tolist()]
            for name, values in QUESTIONS.items()
        }
        return JudgeReading(
            answers["background"],
            answers["character"],
            answers["action"],
            {name: answers[name] for name in ATTRIBUTES},
            torch.cat([mask > 0 for _, mask in parts]).numpy(),
        )
