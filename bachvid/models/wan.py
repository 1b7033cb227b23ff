"""Wan2.1 from text (1.3B, 14B and models like them) on the diffusers classes.

For the same inputs it returns what the stock diffusers pipeline does, bit by bit. Latents are
[1, C, F, h, w] in fp32, whatever the dtype of the weights. Text has a cross-attention, so the joint
tokens are those of the video. Shapes: B batch, F latent frames, T text tokens, S video
tokens, N video positions, H heads, D channels per head, C channels.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor
from transformers import UMT5EncoderModel

from bachvid.attention.attend import controlled_attention, controlled_cross_attention
from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionControl
from bachvid.attention.groups import SequenceGroup
from bachvid.attention.rotary import Rotary
from bachvid.catalog.facts import ModelFacts
from bachvid.inputs.sections import ModelConfig, ResolvedSampling
from bachvid.models.base import Grid, VideoModel
from bachvid.models.loading import load_adapter
from bachvid.models.solvers import FlowSolver, Solver


class WanSelfAttention:
    """Wan attention among video tokens, of one layer, with one seam before RoPE. No state."""

    def __init__(self, layer: int, context: RunContext, control: AttentionControl) -> None:
        self.layer = layer
        self.context = context
        self.control = control

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,  # the same table as context.rotary
    ) -> Tensor:
        """Attend among video rows; diffusers, which calls this, fixes the names."""
        qkv = QKV(*_project(attn, hidden_states, hidden_states))
        out_BSC = controlled_attention(self.context, self.control, self.layer, qkv)
        out: Tensor = attn.to_out[0](out_BSC)  # [1] is dropout
        return out


class WanCrossAttention:
    """Wan attention from video to text tokens, of one layer, that a control may look at."""

    def __init__(self, layer: int, context: RunContext, control: AttentionControl) -> None:
        self.layer = layer
        self.context = context
        self.control = control

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        """Attend to all text tokens, padding too, as Wan was trained."""
        query, key, value = _project(attn, hidden_states, encoder_hidden_states)
        out_BSC = controlled_cross_attention(
            self.context, self.control, self.layer, query, key, value
        )
        out: Tensor = attn.to_out[0](out_BSC)
        return out


def _project(
    attn: WanAttention, video_BSC: Tensor, source_BTC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value by heads; the norms are over all heads together."""
    query_BSC, key_BTC = attn.norm_q(attn.to_q(video_BSC)), attn.norm_k(attn.to_k(source_BTC))
    query, key, value = (
        x_BTC.unflatten(2, (attn.heads, -1))
        for x_BTC in (query_BSC, key_BTC, attn.to_v(source_BTC))
    )
    return query, key, value


class WanModel(VideoModel):
    """The adapter. The autoencoder is held in fp32 whatever `model.dtype` is."""

    first_block = "blocks.0"
    behind_blocks = "norm_out"

    def solver(self, sampling: ResolvedSampling, noise: Tensor, noise_seed: int) -> Solver:
        """Return "unipc" or "euler", with the shift that the weights want; both draw nothing."""
        shift = self.facts.flow_shift
        if sampling.scheduler == "unipc":
            scheduler = UniPCMultistepScheduler.from_config(
                self._scheduler_config,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=shift,
            )
        else:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sampling.num_steps, device=self.device)
        return FlowSolver(scheduler)

    def controlled_processors(
        self, context: RunContext, control: AttentionControl
    ) -> dict[str, WanSelfAttention | WanCrossAttention]:
        """Return one processor per attention, by its path in the transformer."""
        layers = range(self.facts.num_layers)
        return {
            f"blocks.{layer}.attn1.processor": WanSelfAttention(layer, context, control)
            for layer in layers
        } | {
            f"blocks.{layer}.attn2.processor": WanCrossAttention(layer, context, control)
            for layer in layers
        }

    @property
    def _latent_dtype(self) -> torch.dtype:
        return torch.float32

    def _latent_shape(self, grid: Grid) -> tuple[int, ...]:
        frames, height, width = grid
        patch = self.facts.patch_size
        return (1, self.facts.latent_channels, frames, height * patch, width * patch)

    def _rotary_table(self, grid: Grid) -> Rotary:
        # The table depends on the shape of the latents only.
        latents = torch.empty(self._latent_shape(grid), device="meta")
        cos_BSHD, sin_BSHD = self.transformer.rope(latents)
        cos_ND, sin_ND = (x_BSHD[0, :, 0].to(self.device) for x_BSHD in (cos_BSHD, sin_BSHD))
        return Rotary(cos_ND, sin_ND)

    def _embed(self, encoder: UMT5EncoderModel, ids_1T: Tensor, num_tokens: int) -> Tensor:
        """Return embeddings; those of padding are zeros, as in training."""
        mask_1T = torch.zeros_like(ids_1T)
        mask_1T[:, :num_tokens] = 1
        embeds: Tensor = encoder(ids_1T, mask_1T)[0].to(self.dtype)
        embeds[:, num_tokens:] = 0
        return embeds

    def _predict(self, latents: Tensor, timestep_B: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Run the transformer in the dtype of the weights, in which the stock pipeline guides."""
        prediction: Tensor = self.transformer(
            hidden_states=latents.to(self.dtype),
            timestep=timestep_B,
            encoder_hidden_states=prompt_embeds,
            return_dict=False,
        )[0]
        return prediction

    def _unscaled(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.dtype)
        mean, inverse_std = self._statistics(latents)
        # Divided by the inverse, as in the stock pipeline: else the last bits differ.
        return latents / inverse_std + mean

    def _scaled(self, encoded_BCFhw: Tensor) -> Tensor:
        mean, inverse_std = self._statistics(encoded_BCFhw)
        return (encoded_BCFhw - mean) * inverse_std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of each latent channel and the inverse of its standard deviation."""
        config = self.vae.config
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(like)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, 1.0 / std


def load_wan(config: ModelConfig, facts: ModelFacts, group: SequenceGroup) -> WanModel:
    """Load Wan2.1 from a folder or the Hub. Raises as `load_adapter` does."""
    return load_adapter(
        WanModel,
        config,
        facts,
        group,
        classes={
            "transformer": (WanTransformer3DModel,),
            "vae": (AutoencoderKLWan,),
            "text_encoder": (UMT5EncoderModel,),
            "scheduler": (UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler),
        },
    )
