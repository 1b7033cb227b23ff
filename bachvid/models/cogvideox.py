"""CogVideoX (2b, 5b and models trained like them) on the diffusers classes.

For the same inputs it returns what the stock diffusers pipeline does, bit by bit. Latents are
[1, F, C, h, w] in the dtype of the weights. Shapes: B batch, F latent frames, T text tokens,
S joint tokens [text | video], N video tokens, H heads, D channels per head, C channels.
"""

from __future__ import annotations

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
from torch import Tensor
from transformers import T5EncoderModel

from bachvid.attention.attend import controlled_attention
from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionControl
from bachvid.attention.groups import SequenceGroup
from bachvid.attention.rotary import Rotary
from bachvid.catalog.facts import ModelFacts
from bachvid.inputs.sections import ModelConfig, ResolvedSampling
from bachvid.models.base import Grid, VideoModel
from bachvid.models.loading import load_adapter
from bachvid.models.solvers import DdimSolver, DpmSolver, Solver


class CogVideoXControlledProcessor:
    """CogVideoX attention of one layer with one seam, before RoPE. Keeps no state."""

    def __init__(self, layer: int, context: RunContext, control: AttentionControl) -> None:
        self.layer = layer
        self.context = context
        self.control = control

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,  # the same table as context.rotary
    ) -> tuple[Tensor, Tensor]:
        """Attend over [text | video]; diffusers, which calls this, fixes names and result."""
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
        out_BSC = controlled_attention(self.context, self.control, self.layer, qkv)
        out_BSC = attn.to_out[0](out_BSC)  # [1] is dropout
        return out_BSC[:, text_tokens:], out_BSC[:, :text_tokens]


class CogVideoXModel(VideoModel):
    """The adapter. Without RoPE (2b), positions are added to the features at the input."""

    first_block = "transformer_blocks.0"
    behind_blocks = "norm_final"

    def solver(self, sampling: ResolvedSampling, noise: Tensor, noise_seed: int) -> Solver:
        """Return "ddim" or "dpm", with the noise schedule of the weights."""
        scheduler_class = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
        scheduler = scheduler_class[sampling.scheduler].from_config(self._scheduler_config)
        scheduler.set_timesteps(sampling.num_steps, device=self.device)
        if sampling.scheduler == "ddim":
            return DdimSolver(scheduler)
        generator = torch.Generator().manual_seed(noise_seed)
        # The stock pipeline draws the initial noise from the same generator: draw past it.
        torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
        return DpmSolver(scheduler, generator)

    def controlled_processors(
        self, context: RunContext, control: AttentionControl
    ) -> dict[str, CogVideoXControlledProcessor]:
        """Return one processor per layer, by its path in the transformer."""
        return {
            f"transformer_blocks.{layer}.attn1.processor": CogVideoXControlledProcessor(
                layer, context, control
            )
            for layer in range(self.facts.num_layers)
        }

    @property
    def _latent_dtype(self) -> torch.dtype:
        return self.dtype

    def _latent_shape(self, grid: Grid) -> tuple[int, ...]:
        frames, height, width = grid
        patch = self.facts.patch_size
        return (1, frames, self.facts.latent_channels, height * patch, width * patch)

    def _rotary_table(self, grid: Grid) -> Rotary:
        if not self.facts.has_rope:
            return Rotary.none()
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
        return Rotary(cos_ND, sin_ND)

    def _embed(self, encoder: T5EncoderModel, ids_1T: Tensor, num_tokens: int) -> Tensor:
        """Return embeddings; padding is not masked, as in training."""
        embeds: Tensor = encoder(ids_1T)[0].to(self.dtype)
        return embeds

    def _predict(self, latents: Tensor, timestep_B: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Run the transformer; the result is fp32, in which the stock pipeline applies guidance."""
        _, frames, _, height, width = latents.shape
        patch = self.facts.patch_size
        rotary = self._rotary_of((frames, height // patch, width // patch))
        prediction: Tensor = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=prompt_embeds,
            timestep=timestep_B,
            image_rotary_emb=None if rotary.is_none else (rotary.cos_ND, rotary.sin_ND),
            return_dict=False,
        )[0]
        return prediction.float()

    def _unscaled(self, latents: Tensor) -> Tensor:
        unscaled: Tensor = 1 / self.vae.config.scaling_factor * latents.transpose(1, 2)
        return unscaled

    def _scaled(self, encoded_BCFhw: Tensor) -> Tensor:
        scaled: Tensor = self.vae.config.scaling_factor * encoded_BCFhw.transpose(1, 2)
        return scaled


def load_cogvideox(config: ModelConfig, facts: ModelFacts, group: SequenceGroup) -> CogVideoXModel:
    """Load CogVideoX from a folder or the Hub. Raises as `load_adapter` does."""
    return load_adapter(
        CogVideoXModel,
        config,
        facts,
        group,
        classes={
            "transformer": (CogVideoXTransformer3DModel,),
            "vae": (AutoencoderKLCogVideoX,),
            "text_encoder": (T5EncoderModel,),
            "scheduler": (CogVideoXDDIMScheduler, CogVideoXDPMScheduler),
        },
    )
