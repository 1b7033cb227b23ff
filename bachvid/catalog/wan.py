"""Wan2.1: the files of its folders, and the published models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.profiles import DefaultFacts, wan_attention
from bachvid.catalog.wan_files import WanTransformerFile, WanVaeFile
from bachvid.inputs.choices import Dtype


def _wan_facts(
    transformer: WanTransformerFile,
    vae: WanVaeFile,
    *,
    name: str,
    folder: Path | None,
    dtype: Dtype = "float32",
) -> ModelFacts:
    return ModelFacts(
        name=name,
        family="wan",
        folder=folder,
        num_layers=transformer.num_layers,
        num_heads=transformer.num_attention_heads,
        head_dim=transformer.attention_head_dim,
        ffn_dim=transformer.ffn_dim,
        text_tokens=512,  # no file says it: the stock pipeline's default
        text_dim=transformer.text_dim,
        has_rope=True,
        patch_size=transformer.patch_size[1],
        latent_channels=transformer.in_channels,
        spatial_ratio=vae.scale_factor_spatial,
        temporal_ratio=vae.scale_factor_temporal,
        vae_channels=vae.base_dim,
        defaults=DefaultFacts(
            pixel_frames=81,
            height=480,
            width=832,
            fps=16,
            num_steps=50,
            guidance_scale=5.0,
            scheduler="unipc",
            dtype=dtype,
            noise="same",
        ),
        attention=wan_attention(transformer.num_layers, 3.0),
        flow_shift=3.0,
        max_grid=transformer.rope_max_seq_len,
    )


# Source: diffusers, scripts/convert_wan_to_diffusers.py, get_transformer_config.
_WAN_TRANSFORMERS: Mapping[str, WanTransformerFile] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": WanTransformerFile(
        num_layers=30, num_attention_heads=12, ffn_dim=8960
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": WanTransformerFile(),
}
