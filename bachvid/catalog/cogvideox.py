"""CogVideoX 1.0 from text: the files of its folders, and the published models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from bachvid.catalog.facts import Family, ModelFacts
from bachvid.catalog.families import ComponentTraits, DecoderTraits, FamilyFacts
from bachvid.catalog.files import (
    ComponentSize,
    JsonFile,
    TextEncoderFile,
    check_channels,
    read_json,
)
from bachvid.catalog.profiles import DefaultFacts, cogvideox_attention
from bachvid.errors import ModelSupportError
from bachvid.inputs.choices import Dtype

TRAITS = FamilyFacts(
    name="cogvideox",
    pipeline="CogVideoXPipeline",
    schedulers=("ddim", "dpm"),
    passes=(("uncond", "cond"),),
    has_joint_text=True,
    size_step=8,
    cleans_text=False,
    text_tokens=None,
    adds_in_fp32=False,
    makes_rotary=False,
    components={
        "transformer": ComponentTraits(),
        "vae": ComponentTraits(),
        # transformers keeps these of a T5, in float16 only.
        "text_encoder": ComponentTraits(fp32_words=frozenset({"wo"}), fp32_in=("float16",)),
    },
    # An untiled decode needs about 50 KB per pixel in 16 bits (17.8 GB at 480x720, says diffusers'
    # own estimate). The size of the tiles is that of the published models. Others need not do:
    # tiled_decode rounds, and pixel rows double or get lost.
    decoder=DecoderTraits(
        values=22_890, channels=128, tiled_from=320 * 480, tile=(240, 360), stride=(200, 288)
    ),
)


class TransformerFile(JsonFile):
    """The config of a CogVideoXTransformer3DModel."""

    num_layers: int = Field(30, ge=1)
    num_attention_heads: int = Field(30, ge=1)
    attention_head_dim: int = Field(64, ge=1)
    in_channels: int = Field(16, ge=1)
    max_text_seq_length: int = Field(226, ge=1)
    text_embed_dim: int = Field(4096, ge=1)
    use_rotary_positional_embeddings: bool = False
    patch_size: int = Field(2, ge=1)
    patch_size_t: int | None = Field(None, ge=1)
    sample_frames: int = Field(49, ge=1)
    sample_height: int = Field(60, ge=1)
    sample_width: int = Field(90, ge=1)


class VaeFile(JsonFile):
    """The config of an AutoencoderKLCogVideoX."""

    latent_channels: int = Field(16, ge=1)
    block_out_channels: tuple[int, ...] = Field((128, 256, 256, 512), min_length=1)
    temporal_compression_ratio: int = Field(4, ge=1)


def _read(folder: Path, name: str) -> ModelFacts:
    transformer = read_json(folder / "transformer" / "config.json", TransformerFile)
    if transformer.patch_size_t is not None:
        raise ModelSupportError(
            f"{folder}: has patch_size_t {transformer.patch_size_t}, so it is a CogVideoX 1.5: "
            f"only 1.0 is supported; use CogVideoX-2b or CogVideoX-5b"
        )
    vae = read_json(folder / "vae" / "config.json", VaeFile)
    encoder = read_json(folder / "text_encoder" / "config.json", TextEncoderFile)
    check_channels(
        folder,
        latent=(transformer.in_channels, vae.latent_channels),
        text=(transformer.text_embed_dim, encoder.d_model),
    )
    return replace(_facts(transformer, vae, name=name), folder=folder)


def _facts(
    transformer: TransformerFile,
    vae: VaeFile,
    *,
    name: str,
    dtype: Dtype = "float32",  # right for every folder
) -> ModelFacts:
    spatial_ratio = 2 ** (len(vae.block_out_channels) - 1)
    return ModelFacts(
        name=name,
        traits=TRAITS,
        folder=None,
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


def _published() -> Mapping[str, ModelFacts]:
    """Sizes: diffusers, scripts/convert_cogvideox_to_diffusers.py, get_transformer_init_kwargs.

    The numbers of weights are checked against the real classes by a test.
    """
    large = TransformerFile(
        num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True
    )
    models: Mapping[str, tuple[TransformerFile, Dtype, int]] = {
        "CogVideoX-2b": (TransformerFile(), "float16", 1_693_783_872),
        "CogVideoX-5b": (large, "bfloat16", 5_570_283_072),
    }
    return {
        hub_id: replace(
            _facts(transformer, VaeFile(), name=hub_id, dtype=dtype),
            sizes={
                "transformer": ComponentSize(values),
                "vae": ComponentSize(215_583_907),
                "text_encoder": ComponentSize(4_762_310_656, 1_006_632_960),
            },
        )
        for name, (transformer, dtype, values) in models.items()
        for hub_id in (f"THUDM/{name}", f"zai-org/{name}")  # both spellings are in use
    }


FAMILY = Family(TRAITS, _read, _published())
