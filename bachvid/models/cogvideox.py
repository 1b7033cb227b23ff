"""CogVideoX (2b, 5b and models trained like them) on the diffusers classes, which stay as they are.

Gives, for the same inputs, what the stock diffusers pipeline gives, bit by bit. It must not know
what a control does. Shapes: B batch, F latent frames, P prompts, T text tokens, S joint tokens
[text | video], N video tokens, H heads, D channels per head, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from numpy.typing import NDArray
from torch import Tensor
from transformers import T5EncoderModel

from bachvid.attention.attend import controlled_attention
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

SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}

# An untiled decode needs about 50 KB per pixel in 16 bits (17.8 GB at 480x720, says diffusers'
# own estimate): from here on, the decoder works on overlapping tiles. Their size is that of the
# published models. Others need not do: tiled_decode rounds, and pixel rows double or get lost.
TILED_FROM_PIXELS = 320 * 480
TILE_HEIGHT, TILE_WIDTH = 240, 360


class CogVideoXControlledProcessor:
    """CogVideoX attention of one layer with one seam, before RoPE. Keeps no state."""

    def __init__(self, layer: int, run: RunContext, control: AttentionControl) -> None:
        self.layer = layer
        self.run = run
        self.control = control

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,  # the same table as run.rotary
    ) -> tuple[Tensor, Tensor]:
        """Attend over [text | video]; names and result as diffusers, which calls this."""
        text_tokens = encoder_hidden_states.shape[1]
        joint_BSC = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        heads = (attn.heads, -1)
        # No name for what is needed once: it would stay in memory through the attention.
        qkv = QKV(
            attn.norm_q(attn.to_q(joint_BSC).unflatten(2, heads)),
            attn.norm_k(attn.to_k(joint_BSC).unflatten(2, heads)),
            attn.to_v(joint_BSC).unflatten(2, heads),
        )
        del joint_BSC
        out_BSC = controlled_attention(self.run, self.control, self.layer, qkv)
        out_BSC = attn.to_out[0](out_BSC)  # [1] is dropout
        return out_BSC[:, text_tokens:], out_BSC[:, :text_tokens]


class CogVideoXModel:
    """A VideoModel. The text encoder is loaded when it is first needed: frame videos need none."""

    def __init__(
        self,
        facts: ModelFacts,
        *,
        transformer: CogVideoXTransformer3DModel,
        vae: AutoencoderKLCogVideoX,
        load_text_encoder: Callable[[], TextEncoder],
        scheduler_config: dict[str, object],
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
        shard_tokens(transformer.transformer_blocks[0], transformer.norm_final, group)

    def layout(self, video: VideoConfig) -> TokenLayout:
        """Return where text and video tokens stand. Raises ConfigError for an illegal size."""
        return self.facts.layout(video)

    def rotary(self, video: VideoConfig) -> Rotary:
        """Return the position table of the video tokens; `Rotary.none()` for CogVideoX-2b."""
        return self._rotary_of(self.facts.layout(video).grid)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return embeddings [P, T, C]. Padding is not masked, as CogVideoX was trained."""
        if self._text_encoder is None:
            self._text_encoder = self._load_text_encoder()
        tokenizer, encoder = self._text_encoder

        @torch.no_grad()
        def encode(prompt: Prompt) -> Tensor:
            ids = torch.tensor([tokenizer.tokenize(prompt).ids], device=self.device)
            embeds: Tensor = encoder(ids)[0].to(self.dtype)
            return embeds

        return encode_each(prompts, encode)

    def free_text_encoder(self) -> None:
        """Drop the text encoder's weights; the next `encode_prompts` loads them again."""
        self._text_encoder = None

    def initial_noise(self, seed: int, video: VideoConfig) -> Tensor:
        """Return latents [1, F, C, height, width], drawn on the CPU in the model's dtype."""
        frames, height, width = self.facts.layout(video).grid
        patch = self.facts.patch_size
        shape = (1, frames, self.facts.latent_channels, height * patch, width * patch)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=self.dtype).to(self.device)

    def scheduler(self, name: str) -> Scheduler:
        """Return a fresh scheduler, "ddim" or "dpm", with the noise schedule of the weights."""
        scheduler: Scheduler = SCHEDULERS[name].from_config(self._scheduler_config)
        return scheduler

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Run the transformer once, on latents [B, F, C, height, width] of one timestep.

        In fp32, in which the stock pipeline guides.
        """
        _, frames, _, height, width = latents.shape
        patch = self.facts.patch_size
        rotary = self._rotary_of((frames, height // patch, width // patch))
        prediction: Tensor = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=prompt_embeds,
            timestep=timestep.expand(len(latents)),
            image_rotary_emb=None if rotary.is_none else (rotary.cos_ND, rotary.sin_ND),
            return_dict=False,
        )[0]
        return prediction.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return frames [frames, height, width, 3] of latents [1, F, C, height, width]."""
        _, _, _, height, width = latents.shape
        ratio = self.facts.spatial_ratio
        if height * width * ratio**2 >= TILED_FROM_PIXELS:
            self.vae.enable_tiling(TILE_HEIGHT, TILE_WIDTH)
        else:
            self.vae.disable_tiling()
        scaled_BCFHW = 1 / self.vae.config.scaling_factor * latents.transpose(1, 2)
        video_CFHW = self.vae.decode(scaled_BCFHW).sample[0]
        return to_frames(video_CFHW)

    def controlled_processors(
        self, run: RunContext, control: AttentionControl
    ) -> dict[str, CogVideoXControlledProcessor]:
        """Return one processor per layer, by its path in the transformer."""
        return {
            f"transformer_blocks.{layer}.attn1.processor": CogVideoXControlledProcessor(
                layer, run, control
            )
            for layer in range(self.facts.num_layers)
        }

    def _rotary_of(self, grid: tuple[int, int, int]) -> Rotary:
        if not self.facts.has_rope:
            return Rotary.none()
        if grid not in self._rotary:
            frames, height, width = grid
            config = self.transformer.config
            crop = get_resize_crop_region_for_grid(
                (height, width),
                config.sample_width // config.patch_size,
                config.sample_height // config.patch_size,
            )
            cos_ND, sin_ND = get_3d_rotary_pos_embed(
                embed_dim=config.attention_head_dim,
                crops_coords=crop,
                grid_size=(height, width),
                temporal_size=frames,
                device=self.device,
            )
            self._rotary[grid] = Rotary(cos_ND, sin_ND)
        return self._rotary[grid]


def load_cogvideox(config: ModelConfig, facts: ModelFacts, group: SequenceGroup) -> CogVideoXModel:
    """Load CogVideoX from a folder or the Hub: safetensors weights only, no code from there.

    Raises:
        ConfigError: a folder, file or Hub id is missing or damaged; the device does not exist.
        ModelSupportError: a part of the model is of another class than CogVideoX's.
    """
    loader = PartLoader(
        config,
        facts,
        classes={
            "transformer": (CogVideoXTransformer3DModel,),
            "vae": (AutoencoderKLCogVideoX,),
            "text_encoder": (T5EncoderModel,),
            "scheduler": tuple(SCHEDULERS.values()),
        },
    )
    transformer = loader.load(CogVideoXTransformer3DModel, "transformer")
    vae = loader.load(AutoencoderKLCogVideoX, "vae")
    loader.place(transformer, vae)
    return CogVideoXModel(
        facts,
        transformer=transformer,
        vae=vae,
        load_text_encoder=lambda: loader.load_text_encoder(T5EncoderModel),
        scheduler_config=loader.scheduler_config(CogVideoXDDIMScheduler),
        device=loader.device,
        group=group,
    )
