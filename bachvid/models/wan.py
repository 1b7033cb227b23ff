"""Wan2.1 from text (1.3B, 14B and models like them) on the diffusers classes, left as they are.

Gives, for the same inputs, what the stock diffusers pipeline gives, bit by bit. It must not know
what a control does. Text has an attention of its own, so the joint tokens are those of the video.
Shapes: B batch, F latent frames, P prompts, T text tokens, S and N video tokens, H heads,
D channels per head, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttention
from numpy.typing import NDArray
from torch import Tensor
from transformers import UMT5EncoderModel

from bachvid.attention.attend import controlled_attention, controlled_cross_attention
from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionControl
from bachvid.attention.groups import ALONE, SequenceGroup
from bachvid.attention.rotary import Rotary
from bachvid.catalog.facts import ModelFacts
from bachvid.inputs.sections import ModelConfig, VideoConfig
from bachvid.layout.tokens import TokenLayout
from bachvid.models.base import Scheduler, shard_tokens
from bachvid.models.loading import PartLoader, TextEncoder, encode_each, to_frames
from bachvid.prompts.compose import Prompt

# Beyond this the decoder works on overlapping tiles, of its own size. Whole, it needs about 25 KB
# per pixel (measured, in fp32; any number of frames): 10 GB here, 23 GB at 720 x 1280.
TILED_ABOVE_PIXELS = 480 * 832


class WanSelfAttention:
    """Wan attention among video tokens, of one layer, with one seam before RoPE. No state."""

    def __init__(self, layer: int, run: RunContext, control: AttentionControl) -> None:
        self.layer = layer
        self.run = run
        self.control = control

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,  # the same table as run.rotary
    ) -> Tensor:
        """Attend among the video rows of this rank; names are those of diffusers, which calls."""
        qkv = QKV(*_project(attn, hidden_states, hidden_states))
        out_BSC = controlled_attention(self.run, self.control, self.layer, qkv)
        out: Tensor = attn.to_out[0](out_BSC)  # [1] is dropout
        return out


class WanCrossAttention:
    """Wan attention from video to text tokens, of one layer, that a control may look at."""

    def __init__(self, layer: int, run: RunContext, control: AttentionControl) -> None:
        self.layer = layer
        self.run = run
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
        out_BSC = controlled_cross_attention(self.run, self.control, self.layer, query, key, value)
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


class WanModel:
    """A VideoModel. The text encoder is loaded when it is first needed: frame videos need none.

    Latents are [1, C, F, height, width] in fp32, whatever the dtype of the weights.
    """

    def __init__(
        self,
        facts: ModelFacts,
        *,
        transformer: WanTransformer3DModel,
        vae: AutoencoderKLWan,
        load_text_encoder: Callable[[], TextEncoder],
        scheduler_config: dict[str, Any],
        device: torch.device,
        group: SequenceGroup = ALONE,
    ) -> None:
        self.facts = facts
        self.group = group
        self.transformer = transformer
        self.device = device
        self.dtype: torch.dtype = transformer.dtype
        self.vae = vae
        self._load_text_encoder = load_text_encoder
        self._text_encoder: TextEncoder | None = None
        self._scheduler_config = scheduler_config
        self._rotary: dict[tuple[int, int, int], Rotary] = {}
        shard_tokens(transformer.blocks[0], transformer.norm_out, group)

    def layout(self, video: VideoConfig) -> TokenLayout:
        """Return where video tokens stand. Raises ConfigError for an illegal size."""
        return self.facts.layout(video)

    def rotary(self, video: VideoConfig) -> Rotary:
        """Return the position table of the video tokens."""
        grid = self.facts.layout(video).grid
        if grid not in self._rotary:
            # The table depends on the shape of the latents only.
            latents = torch.empty(self._latent_shape(video), device="meta")
            cos_BSHD, sin_BSHD = self.transformer.rope(latents)
            cos_ND, sin_ND = (x_BSHD[0, :, 0].to(self.device) for x_BSHD in (cos_BSHD, sin_BSHD))
            self._rotary[grid] = Rotary(cos_ND, sin_ND)
        return self._rotary[grid]

    def encode_prompts(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return embeddings [P, T, C]: of padding none, zeros instead, as Wan was trained."""
        if self._text_encoder is None:
            self._text_encoder = self._load_text_encoder()
        tokenizer, encoder = self._text_encoder

        @torch.no_grad()
        def encode(prompt: Prompt) -> Tensor:
            tokens = tokenizer.tokenize(prompt)
            ids = torch.tensor([tokens.ids], device=self.device)
            mask = torch.zeros_like(ids)
            mask[:, : tokens.num_tokens] = 1
            embeds: Tensor = encoder(ids, mask)[0].to(self.dtype)
            embeds[:, tokens.num_tokens :] = 0
            return embeds

        return encode_each(prompts, encode)

    def free_text_encoder(self) -> None:
        """Drop the text encoder's weights; the next `encode_prompts` loads them again."""
        self._text_encoder = None

    def initial_noise(self, seed: int, video: VideoConfig) -> Tensor:
        """Return latents [1, C, F, height, width], drawn on the CPU in fp32."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self._latent_shape(video), generator=generator, dtype=torch.float32)
        return noise.to(self.device)

    def scheduler(self, name: str) -> Scheduler:
        """Return a fresh scheduler, "unipc" or "euler", with the shift that the weights want."""
        config = self._scheduler_config
        shift = config.get("flow_shift", config.get("shift", 1.0))
        scheduler: Scheduler
        if name == "unipc":
            scheduler = UniPCMultistepScheduler.from_config(
                config,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=shift,
            )
        else:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        return scheduler

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Run the transformer once, on latents [B, C, F, height, width] of one timestep.

        In the dtype of the weights, in which the stock pipeline guides.
        """
        prediction: Tensor = self.transformer(
            hidden_states=latents.to(self.dtype),
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=prompt_embeds,
            return_dict=False,
        )[0]
        return prediction

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return frames [frames, height, width, 3] of latents [1, C, F, height, width]."""
        _, channels, _, height, width = latents.shape
        if height * width * self.facts.spatial_ratio**2 > TILED_ABOVE_PIXELS:
            self.vae.enable_tiling()
        else:
            self.vae.disable_tiling()
        config = self.vae.config
        latents = latents.to(self.vae.dtype)
        mean, std = (
            torch.tensor(values).view(1, channels, 1, 1, 1).to(latents)
            for values in (config.latents_mean, config.latents_std)
        )
        # Divided by the inverse, as in the stock pipeline: else the last bits differ.
        video_CFHW = self.vae.decode(latents / (1.0 / std) + mean).sample[0]
        return to_frames(video_CFHW)

    def controlled_processors(
        self, run: RunContext, control: AttentionControl
    ) -> dict[str, WanSelfAttention | WanCrossAttention]:
        """Return one processor per attention, by its path in the transformer."""
        layers = range(self.facts.num_layers)
        return {
            f"blocks.{layer}.attn1.processor": WanSelfAttention(layer, run, control)
            for layer in layers
        } | {
            f"blocks.{layer}.attn2.processor": WanCrossAttention(layer, run, control)
            for layer in layers
        }

    def _latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int, int]:
        frames, height, width = self.facts.layout(video).grid
        patch = self.facts.patch_size
        return (1, self.facts.latent_channels, frames, height * patch, width * patch)


def load_wan(config: ModelConfig, facts: ModelFacts, group: SequenceGroup) -> WanModel:
    """Load Wan2.1 from a folder or the Hub: safetensors weights only, no code from there.

    The autoencoder is held in fp32 whatever `model.dtype` is, as Wan's authors advise.

    Raises:
        ConfigError: a folder, file or Hub id is missing or damaged; the device does not exist.
        ModelSupportError: a part of the model is of another class than Wan2.1's.
    """
    loader = PartLoader(
        config,
        facts,
        classes={
            "transformer": (WanTransformer3DModel,),
            "vae": (AutoencoderKLWan,),
            "text_encoder": (UMT5EncoderModel,),
            "scheduler": (UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler),
        },
    )
    transformer = loader.load(WanTransformer3DModel, "transformer")
    vae = loader.load(AutoencoderKLWan, "vae", dtype=torch.float32)
    loader.place(transformer, vae)
    return WanModel(
        facts,
        transformer=transformer,
        vae=vae,
        load_text_encoder=lambda: loader.load_text_encoder(UMT5EncoderModel),
        scheduler_config=loader.scheduler_config(UniPCMultistepScheduler),
        device=loader.device,
        group=group,
    )
