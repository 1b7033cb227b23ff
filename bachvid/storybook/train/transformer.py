"""Train the transformer of the storybook model, with its text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from torch import Tensor, nn

from bachvid.inputs.words import content_words
from bachvid.storybook import model as storybook
from bachvid.storybook.train.common import Clips, Settings, Trainer, to_video, warm_then_decay
from bachvid.storybook.world import ACTIONS, BACKGROUNDS, CHARACTERS

_BATCH = 64
_RATE = 1.25  # of the learning rates, which are those of a batch of 16
MASK_LAYERS = (2, 3, 4, 5)  # whose attention to the prompt is trained to find the character
TOKEN_IS_CHARACTER = 0.3  # share of a token's pixels


@dataclass(frozen=True, slots=True)
class Latents:
    """Encoded clips: latent float16 [N, F, C, h, w], labels [N, 3].

    token_mask and token_head [N, F, h, w], in 0..1, are the shares of a token's pixels that are
    character, and head and hat.
    """

    latent: Tensor
    token_mask: Tensor
    token_head: Tensor
    labels: Tensor

    def to(self, device: str) -> Latents:
        """Return the same latents on `device`; the labels stay where prompts are put together."""
        moved = (x.to(device) for x in (self.latent, self.token_mask, self.token_head))
        return Latents(*moved, self.labels)


def pool_to_tokens(mask: Tensor) -> Tensor:
    """Return the share of each token's pixels that is character: [N, F, H, W] to [N, f, h, w].

    The first latent frame shows the first pixel frame, each later one the next TEMPORAL_RATIO.
    """
    pooled = F.avg_pool2d(mask.float(), storybook.SPATIAL_RATIO)
    later = torch.stack(torch.split(pooled[:, 1:], storybook.TEMPORAL_RATIO, 1), 1).mean(2)
    return torch.cat([pooled[:, :1], later], dim=1)


@torch.no_grad()
def encode_clips(vae: AutoencoderKLCogVideoX, clips: Clips, device: str) -> Latents:
    """Encode clips once; the transformer is trained on the posterior's mean."""
    latents = []
    for frames in torch.split(clips.frames, 64):
        with torch.autocast(device, torch.bfloat16):
            latent = vae.encode(to_video(frames).to(device)).latent_dist.mean
        latents.append(latent.permute(0, 2, 1, 3, 4).half().cpu())
    masks, heads = (
        torch.cat([pool_to_tokens(mask) for mask in torch.split(pixels, 256)])
        for pixels in (clips.mask, clips.head)
    )
    return Latents(torch.cat(latents), masks, heads, clips.labels)


class KeepsTextLogits(Protocol):
    """An attention processor that may keep its logits of text tokens for the mask loss."""

    text_logits: Tensor | None  # [B, heads, video tokens, text tokens]


class Trainee(nn.Module):
    """A transformer with its text encoder, of any family, trained together."""

    transformer: nn.Module
    text_encoder: nn.Module
    blocks: nn.ModuleList
    text_projection: nn.Module
    processors: Sequence[KeepsTextLogits]

    def forward(self, latent: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """Predict what `Noised` says, from noised latents [B, F, C, h, w]."""
        raise NotImplementedError


Noised = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(clean latents, timestep, noise) -> (noised latents, what the transformer is to predict)."""


class AuxiliaryProcessor:
    """Attention as in diffusers, which also keeps its logits of text tokens for the mask loss."""

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self.text_logits: Tensor | None = None  # [B, heads, video tokens, text tokens]

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend; the arguments' names are diffusers', which inspects them."""
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            project(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key = (
            torch.cat([x[:, :, :text], apply_rotary_emb(x[:, :, text:], image_rotary_emb)], dim=2)
            for x in (query, key)
        )
        if self.keeps:
            scale = query.shape[-1] ** -0.5
            self.text_logits = (query[:, :, text:] @ key[:, :, :text].mT).float() * scale
        out = F.scaled_dot_product_attention(query, key, value.to(query.dtype))
        out = attn.to_out[0](out.transpose(1, 2).flatten(2).to(joint.dtype))
        return out[:, text:], out[:, :text]


class TextToVideo(Trainee):
    """Of the first model: CogVideoX and T5."""

    def __init__(self) -> None:
        super().__init__()
        transformer = storybook.build_transformer()
        self.transformer = transformer
        tokenizer = storybook.build_tokenizer()
        self.text_encoder = storybook.build_text_encoder(len(tokenizer))
        self.blocks = transformer.transformer_blocks
        self.text_projection = transformer.patch_embed.text_proj
        self.processors = [
            AuxiliaryProcessor(layer in MASK_LAYERS) for layer in range(storybook.NUM_LAYERS)
        ]
        for block, processor in zip(transformer.transformer_blocks, self.processors, strict=True):
            block.attn1.set_processor(processor)
        cos, sin = get_3d_rotary_pos_embed(
            embed_dim=transformer.config.attention_head_dim,
            crops_coords=((0, 0), (storybook.LATENT_SIZE, storybook.LATENT_SIZE)),
            grid_size=(storybook.LATENT_SIZE, storybook.LATENT_SIZE),
            temporal_size=storybook.LATENT_FRAMES,
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, latent: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """Predict v [B, F, C, h, w] of noised latents."""
        text = self.text_encoder(ids)[0]
        rotary = (self.cos, self.sin)
        prediction: Tensor = self.transformer(
            latent, text, timestep, image_rotary_emb=rotary, return_dict=False
        )[0]
        return prediction


def mask_loss(processors: Sequence[KeepsTextLogits], spans: Tensor, token_mask: Tensor) -> Tensor:
    """Push each mask layer's attention to tell character from background tokens.

    spans bool [B, 2, T]: the text tokens of background and character; token_mask [B, N].
    Per head, the difference of the two parts' log-mean-exp logits; its head mean is a logit.
    """
    losses = []
    for processor in processors:
        if processor.text_logits is None:
            continue
        logits = processor.text_logits
        background, character = (
            torch.logsumexp(logits.masked_fill(~spans[:, part, None, None], -torch.inf), dim=-1)
            - spans[:, part].sum(-1).log()[:, None, None]
            for part in (0, 1)
        )
        losses.append(
            F.binary_cross_entropy_with_logits(
                (character - background).mean(1),
                (token_mask >= TOKEN_IS_CHARACTER).float(),
                pos_weight=torch.tensor(2.0, device=logits.device),
            )
        )
        processor.text_logits = None
    return torch.stack(losses).mean()


_scheduler = cache(storybook.build_scheduler)


def cogvideox_noised(clean: Tensor, timestep: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Noise latents as the first model's scheduler does; return them and their velocity."""
    scheduler = _scheduler()
    noisy: Tensor = scheduler.add_noise(clean, noise, timestep)
    velocity: Tensor = scheduler.get_velocity(clean, noise, timestep)
    return noisy, velocity


class Prompts:
    """Token ids and spans of every caption, with parts left out for guidance and robustness.

    With `only_nouns` the spans leave out function words, as masks by nouns do.
    """

    def __init__(self, *, only_nouns: bool = False) -> None:
        self.tokenizer = storybook.build_tokenizer()
        self._only_nouns = only_nouns
        self._cache: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def encode(self, labels: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Return ids [T] and spans bool [2, T]; a label of -1 leaves its part out."""
        if labels not in self._cache:
            words = zip((BACKGROUNDS, CHARACTERS, ACTIONS), labels, strict=True)
            parts = [phrases[i] if i >= 0 else "" for phrases, i in words]
            text = ", ".join(part for part in parts if part)
            encoded = self.tokenizer(
                text, padding="max_length", return_offsets_mapping=True, return_tensors="pt"
            )
            spans = torch.zeros(2, storybook.TEXT_TOKENS, dtype=torch.bool)
            nouns = content_words(text)
            for row, part in enumerate(parts[:2]):
                start = text.index(part)
                for token, (left, right) in enumerate(encoded["offset_mapping"][0].tolist()):
                    is_inside = bool(part) and start <= left < right <= start + len(part)
                    is_marked = not self._only_nouns or (left, right) in nouns
                    spans[row, token] = is_inside and is_marked
            self._cache[labels] = encoded["input_ids"][0], spans
        return self._cache[labels]

    def batch(self, labels: Iterable[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """Return ids [B, T] and spans [B, 2, T]."""
        encoded = [self.encode(label) for label in labels]
        return torch.stack([ids for ids, _ in encoded]), torch.stack([span for _, span in encoded])


def _drop_parts(labels: Tensor, generator: torch.Generator) -> list[tuple[int, int, int]]:
    """Leave out the whole prompt of 8 % of a batch, and one part of another 8 %."""
    chance = torch.rand(len(labels), generator=generator)
    which = torch.randint(3, (len(labels),), generator=generator)
    kept = labels.clone()
    kept[chance < 0.08] = -1
    one = (chance >= 0.08) & (chance < 0.16)
    kept[one.nonzero()[:, 0], which[one]] = -1
    return [(row[0], row[1], row[2]) for row in kept.tolist()]


def build_optimizers(model: Trainee) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for all else, faster for the text."""
    matrices = [
        p
        for name, p in model.blocks.named_parameters()
        if p.ndim == 2 and name.split(".")[1] in ("attn1", "attn2", "ff", "ffn")
    ]
    text = [*model.text_encoder.parameters(), *model.text_projection.parameters()]
    taken = {id(p) for p in (*matrices, *text)}
    others = [p for p in model.transformer.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.01),
        torch.optim.AdamW(
            [{"params": text, "lr": 3e-3}, {"params": others, "lr": 1.5e-3}],
            betas=(0.9, 0.98),
            weight_decay=0.01,
        ),
    ]


@torch.no_grad()
def swapped_losses(
    model: Trainee, data: Latents, prompts: Prompts, noised: Noised, device: str
) -> dict[str, float]:
    """Return the loss at t 900, and how it rises when one part of the prompt is another's.

    It shows what the model has learnt to follow long before its samples do.
    """
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(len(data.latent), (48,), generator=generator)
    clean = data.latent[rows.to(data.latent.device)].float().cpu()
    noise = torch.randn(clean.shape, generator=generator)
    timestep = torch.full((len(rows),), 900)
    noisy, target = (x.to(device) for x in noised(clean, timestep, noise))
    losses = []
    for part in range(4):
        labels = data.labels[rows].clone()
        if part:
            labels[:, part - 1] = (labels[:, part - 1] + 1) % len(ACTIONS)
        ids, _ = prompts.batch([(a, b, c) for a, b, c in labels.tolist()])
        with torch.autocast(device, torch.bfloat16):
            predicted = model(noisy, timestep.to(device), ids.to(device))
        losses.append(float((predicted.float() - target).square().mean()))
    for processor in model.processors:
        processor.text_logits = None
    names = ("background", "character", "action")
    rises = {name: loss - losses[0] for name, loss in zip(names, losses[1:], strict=True)}
    return {"right": losses[0], **rises}


def train_transformer(
    stage: str,
    model: Trainee,
    noised: Noised,
    prompts: Prompts,
    latents: Callable[[int], Latents],
    settings: Settings,
    *,
    steps: int,
    decay_steps: int,
) -> bool:
    """Train transformer and text encoder. `latents` gives the clips to learn from at a step."""
    trainer = Trainer(settings, stage, model.to(settings.device), build_optimizers(model))
    for block in model.blocks:
        block.compile()

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        # Nothing here waits for a GPU: it is given the next steps while it does this one.
        data, device = latents(step), settings.device
        on_host = torch.Generator().manual_seed(generator.initial_seed())
        picked = torch.randint(len(data.latent), (_BATCH,), generator=on_host)
        stratum = (torch.arange(_BATCH) + torch.rand(_BATCH, generator=on_host)) / _BATCH
        timestep = (2 * stratum / (1 + stratum) * 1000).long().clamp(0, 999)  # towards noise
        rows, timestep = picked.to(device), timestep.to(device)
        clean, share, head = data.latent[rows].float(), data.token_mask[rows], data.token_head[rows]
        noise = torch.randn(clean.shape, generator=generator, device=device)
        noisy, target = noised(clean, timestep, noise)
        kept = _drop_parts(data.labels[picked], on_host)
        ids, spans = (x.to(device) for x in prompts.batch(kept))
        with torch.autocast(device, torch.bfloat16):
            predicted = model(noisy, timestep, ids).float()
        near, near_head = (F.max_pool2d((x > 0.2).float(), 3, 1, 1) for x in (share, head))
        weight = (1 + 5 * near + 5 * near_head)[:, :, None]
        denoising = (weight * (predicted - target).square()).mean() / weight.mean()
        has_both = [i for i, (b, c, _) in enumerate(kept) if b >= 0 and c >= 0]
        whole = torch.tensor(has_both, dtype=torch.int64).to(device)
        for processor in model.processors:
            if processor.text_logits is not None:
                processor.text_logits = processor.text_logits[whole]
        mask = mask_loss(model.processors, spans[whole], share[whole].flatten(1))
        return {"loss": denoising + 0.1 * mask, "denoising": denoising, "mask": mask}

    def inspect(step: int) -> None:
        rise = swapped_losses(model, latents(step), prompts, noised, settings.device)
        trainer.log(step=step, swapped="rise of the loss at t 900", **rise)

    def rate_at(step: int) -> float:
        return _RATE * warm_then_decay(step, warm=60, steps=steps, decay_steps=decay_steps)

    return trainer.run(
        loss_at,
        steps=steps,
        rate_at=rate_at,
        average_decay=0.998,
        inspect=inspect,
        inspect_every=250,
    )
