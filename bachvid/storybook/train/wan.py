"""What training the storybook model of the Wan family needs beside that of the first one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

from bachvid.storybook import model as storybook
from bachvid.storybook import wan
from bachvid.storybook.train.common import Clips, Settings, Trainer, to_video, warm_then_decay
from bachvid.storybook.train.transformer import MASK_LAYERS, Trainee
from bachvid.storybook.train.vae import LATENT_NOISE, WHOLE, keep_float32, reconstruction_losses


class CrossAttention:
    """Text attention as in diffusers, which also keeps its logits for the mask loss."""

    def __init__(self) -> None:
        self.text_logits: Tensor | None = None  # [B, heads, video tokens, text tokens]

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend; the arguments' names are diffusers'."""
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(encoder_hidden_states)),
                attn.to_v(encoder_hidden_states),
            )
        )
        self.text_logits = (query @ key.mT).float() * query.shape[-1] ** -0.5
        out = F.scaled_dot_product_attention(query, key.to(query.dtype), value.to(query.dtype))
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return projected


class WanTextToVideo(Trainee):
    """Of the second model: Wan and UMT5."""

    def __init__(self) -> None:
        super().__init__()
        transformer = wan.build_transformer()
        self.transformer = transformer
        self.text_encoder = wan.build_text_encoder(len(storybook.build_tokenizer()))
        self.blocks = transformer.blocks
        self.text_projection = transformer.condition_embedder.text_embedder
        self.processors = [CrossAttention() for _ in MASK_LAYERS]
        for layer, processor in zip(MASK_LAYERS, self.processors, strict=True):
            transformer.blocks[layer].attn2.set_processor(processor)

    def encode(self, ids: Tensor) -> Tensor:
        """Return the embeddings [B, T, C] of tokens [B, T]: zero where padding is."""
        is_text = ids != storybook.PAD_ID
        embeds: Tensor = self.text_encoder(ids, is_text.long())[0]
        return embeds * is_text[:, :, None]

    def forward(self, latent: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """Predict the flow [B, F, C, h, w] of noised latents."""
        prediction: Tensor = self.transformer(
            latent.transpose(1, 2), timestep, self.encode(ids), return_dict=False
        )[0]
        return prediction.transpose(1, 2)


def flow(clean: Tensor, timestep: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Noise latents along the straight line to `noise`; return them and the line's direction."""
    sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
    return (1 - sigma) * clean + sigma * noise, noise - clean


def train_vae(clips: Clips, latents: Tensor, settings: Settings, steps: int) -> bool:
    """Train the autoencoder of the Wan family on clips and the first model's latents of them.

    The decoder learns to show these latents [N, F, C, h, w], the encoder to give them.
    """
    torch.manual_seed(settings.seed)
    device = settings.device
    vae = wan.build_vae().to(device)
    keep_float32(vae.decoder.conv_out)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, (0.9, 0.98), weight_decay=1e-3)
    trainer = Trainer(settings, "vae-wan", vae, [optimizer])
    noise_scale = LATENT_NOISE * float(latents[:1000].float().std())
    clips, latents = clips.to(device), latents.to(device)

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(clips.frames), (WHOLE,), generator=generator, device=device)
        video = to_video(clips.frames[rows])
        figure, head = (x[rows][:, None].float() for x in (clips.mask, clips.head))
        latent = latents[rows].float().transpose(1, 2).contiguous()
        noise = noise_scale * torch.randn(latent.shape, generator=generator, device=device)
        with torch.autocast(device, torch.bfloat16):
            encoded = vae.encode(video).latent_dist.mean.float()
            decoded = vae.decode(latent + noise).sample.float()
        losses = reconstruction_losses(decoded, video, figure, head)
        match = (encoded - latent).square().mean()
        losses["loss"] = losses["loss"] + match
        return {**losses, "match": match}

    def rate_at(step: int) -> float:
        return warm_then_decay(step, warm=100, steps=steps, decay_steps=int(0.6 * steps))

    return trainer.run(loss_at, steps=steps, rate_at=rate_at, average_decay=0.995)
