"""The parts of the storybook model of the Wan family, real diffusers classes at a small size.

World, prompts and sizes are those of `bachvid.storybook.model`; so are the latents, since its
autoencoder is trained to share them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from bachvid.storybook import model as storybook

WEIGHTS = Path(__file__).parent / "wan_weights"
FLOW_SHIFT = 1.0  # frames of 64 pixels need no more; Wan2.1 has 3 at 480p

_NUM_HEADS, _HEAD_DIM, _TEXT_DIM = 4, 48, 96


def build_vae(latents_std: float = 1.0) -> AutoencoderKLWan:
    """Return an untrained video autoencoder: 9 x 64 x 64 pixels to 5 x 16 x 16 latents."""
    channels = storybook.LATENT_CHANNELS
    return AutoencoderKLWan(
        base_dim=32,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True],
        latents_mean=[0.0] * channels,
        latents_std=[latents_std] * channels,
        scale_factor_temporal=storybook.TEMPORAL_RATIO,
        scale_factor_spatial=storybook.SPATIAL_RATIO,
    )


def build_transformer() -> WanTransformer3DModel:
    """Return an untrained transformer: 1,280 video tokens, 8 layers, 4 heads of 48."""
    width = _NUM_HEADS * _HEAD_DIM
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=_NUM_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=storybook.LATENT_CHANNELS,
        out_channels=storybook.LATENT_CHANNELS,
        text_dim=_TEXT_DIM,
        freq_dim=64,
        ffn_dim=4 * width,
        num_layers=storybook.NUM_LAYERS,
        rope_max_seq_len=64,
    )
    # Every block begins near the identity: without this, training at this size does not start.
    time_proj = transformer.condition_embedder.time_proj
    torch.nn.init.zeros_(time_proj.weight)
    torch.nn.init.zeros_(time_proj.bias)
    for block in transformer.blocks:
        torch.nn.init.zeros_(block.scale_shift_table)
        block.scale_shift_table.data[:, (2, 5)] = 0.25
        block.attn2.to_out[0].weight.data *= 0.25
    for parameter in (
        transformer.scale_shift_table,
        transformer.proj_out.weight,
        transformer.proj_out.bias,
    ):
        torch.nn.init.zeros_(parameter)
    return transformer


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    """Return an untrained two-layer UMT5 encoder."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size,
            d_model=_TEXT_DIM,
            d_kv=_TEXT_DIM // 4,
            d_ff=2 * _TEXT_DIM,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """Return the solver of Wan2.1, of rectified flow."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=FLOW_SHIFT,
    )


def save_storybook(
    folder: Path,
    *,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
) -> None:
    """Write a diffusers Wan folder with float16 safetensors."""
    pipeline = WanPipeline(
        tokenizer=storybook.build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(),
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
