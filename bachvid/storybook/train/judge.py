"""Train the judge on procedural clips, blurred and noised as decoded ones are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bachvid.storybook.judge import QUESTIONS, JudgeNetwork
from bachvid.storybook.train.common import Clips, Settings, Trainer, to_video, warm_then_decay
from bachvid.storybook.world import draw_attributes

_BATCH = 48


def answer_questions(labels: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Return the true answers to QUESTIONS of clips with these labels [N, 3] and seeds."""
    drawn = [
        draw_attributes(np.random.default_rng((seed, *label)))
        for seed, label in zip(seeds, labels.tolist(), strict=True)
    ]
    answers = {name: torch.tensor([row[name] for row in drawn]) for name in drawn[0]}
    prompt = zip(("background", "character", "action"), labels.unbind(1), strict=True)
    return {**dict(prompt), **answers}


def degrade(video: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise and tint clips [B, 3, F, H, W] by random amounts."""

    def amount(scale: float) -> Tensor:
        return scale * torch.rand(len(video), 1, 1, 1, 1, generator=generator)

    blurred = F.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    mixed = video.lerp(blurred, amount(1.0))
    ghost = torch.cat([mixed[:, :, :1], mixed[:, :, :-1]], dim=2)  # as a VAE smears what moves
    mixed = mixed.lerp(ghost, amount(0.15))
    noise = torch.randn(video.shape, generator=generator) * amount(0.12)
    return (mixed + noise + amount(0.1) - 0.05).clamp(-1, 1)


def train_judge(clips: Clips, decoded: Clips, settings: Settings, steps: int) -> bool:
    """Train on `clips` of the seeds from 0, and on the first of them as the VAE decodes them."""
    torch.manual_seed(settings.seed)
    network = JudgeNetwork().to(settings.device)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.02)
    trainer = Trainer(settings, "judge", network, [optimizer])
    answers = answer_questions(clips.labels, range(len(clips.labels)))

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        clean = torch.randint(len(clips.frames), (_BATCH // 2,), generator=generator)
        coded = torch.randint(len(decoded.frames), (_BATCH // 2,), generator=generator)
        rows = torch.cat([clean, coded])
        frames = torch.cat([clips.frames[clean], decoded.frames[coded]])
        video = degrade(to_video(frames), generator).to(settings.device)
        with torch.autocast(settings.device, torch.bfloat16):
            logits, mask = network(video)
        target = clips.mask[rows].float().to(settings.device)
        questions = [
            F.cross_entropy(logits[name], answers[name][rows].to(settings.device))
            for name in QUESTIONS
        ]
        segment = F.binary_cross_entropy_with_logits(mask, target)
        return {"loss": torch.stack(questions).sum() + 3 * segment, "segment": segment}

    return trainer.run(
        loss_at,
        steps=steps,
        rate_at=lambda step: warm_then_decay(step, warm=50, steps=steps, decay_steps=steps // 2),
        average_decay=0.99,
    )


@torch.no_grad()
def measure_judge(network: JudgeNetwork, clips: Clips, first_seed: int) -> dict[str, float]:
    """Return the judge's accuracy for every question, and the mean IoU of its mask."""
    answers = answer_questions(clips.labels, range(first_seed, first_seed + len(clips.labels)))
    parts = [network(to_video(frames)) for frames in torch.split(clips.frames, 64)]
    accuracy = {
        name: float((torch.cat([p[0][name] for p in parts]).argmax(-1) == truth).float().mean())
        for name, truth in answers.items()
    }
    mask = torch.cat([p[1] for p in parts]) > 0
    joint = (mask & clips.mask).sum((1, 2, 3)) / (mask | clips.mask).sum((1, 2, 3))
    return {**accuracy, "mask_iou": float(joint.mean())}
