"""CogVideoX: the files of its folders, and the published models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bachvid.catalog.cogvideox_files import CogVideoXTransformerFile, CogVideoXVaeFile
from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.profiles import DefaultFacts, cogvideox_attention
from bachvid.inputs.choices import Dtype


def _cogvideox_facts(
    transformer: CogVideoXTransformerFile,
    vae: CogVideoXVaeFile,
    *,
    name: str,
    folder: Path | None,
    dtype: Dtype = "float32",  # right for every folder
) -> ModelFacts:
    spatial_ratio = 2 ** (len(vae.block_out_channels) - 1)
    return ModelFacts(
        name=name,
        family="cogvideox",
        folder=folder,
        num_layers=transformer.num_layers,
        num_heads=transformer.num_attention_heads,
        head_dim=transformer.attention_head_dim,
        ffn_dim=4 * transformer.num_attention_heads * transformer.attention_head_dim,
        text_tokens=transformer.max_text_seq_length,
        text_dim=transformer.text_embed_dim,
        has_rope=transformer.use_rotary_positional_embeddings,
        patch_size=transformer.patch_size,
        latent_channels=transformer.in_channels,
        spatial_ratio=spatial_ratio,
        temporal_ratio=vae.temporal_compression_ratio,
        vae_channels=vae.block_out_channels[0],
        defaults=DefaultFacts(
            pixel_frames=transformer.sample_frames,
            height=transformer.sample_height * spatial_ratio,
            width=transformer.sample_width * spatial_ratio,
            fps=8,
            num_steps=50,
            guidance_scale=6.0,
            scheduler="ddim",
            dtype=dtype,
            noise="same",
        ),
        attention=cogvideox_attention(transformer.num_layers),
    )


# --- published models ---------------------------------------------------------------------------

# Source: diffusers, scripts/convert_cogvideox_to_diffusers.py, get_transformer_init_kwargs.
_COGVIDEOX_TRANSFORMERS: Mapping[str, tuple[CogVideoXTransformerFile, Dtype]] = {
    "CogVideoX-2b": (CogVideoXTransformerFile(), "float16"),
    "CogVideoX-5b": (
        CogVideoXTransformerFile(
            num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True
        ),
        "bfloat16",
    ),
}
