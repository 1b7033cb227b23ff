"""Wan2.1 from text: the files of its folders, and the published models."""

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
    ModelIndex,
    TextEncoderFile,
    check_channels,
    read_json,
)
from bachvid.catalog.profiles import DefaultFacts, wan_attention
from bachvid.errors import ModelSupportError
from bachvid.inputs.choices import Dtype

TEXT_TOKENS = 512  # no file says it: the stock pipeline's default
PUBLISHED_SHIFT = 3.0  # the published steps are of it, and so the levels of all models

TRAITS = FamilyFacts(
    name="wan",
    pipeline="WanPipeline",
    schedulers=("unipc", "euler"),
    passes=(("cond",), ("uncond",)),
    has_joint_text=False,
    size_step=16,
    cleans_text=True,
    text_tokens=TEXT_TOKENS,
    adds_in_fp32=True,
    makes_rotary=True,
    components={
        # diffusers keeps these.
        "transformer": ComponentTraits(
            fp32_words=frozenset({"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})
        ),
        # As Wan's authors advise.
        "vae": ComponentTraits(is_fp32=True),
        # transformers keeps these of a UMT5, in float16 only.
        "text_encoder": ComponentTraits(fp32_words=frozenset({"wo"}), fp32_in=("float16",)),
    },
    # Untiled, a decode needs about 25 KB per pixel (measured, in fp32; any number of frames): 10 GB
    # at 480 x 832, 23 GB at 720 x 1280. Tiles are the autoencoder's own.
    decoder=DecoderTraits(
        values=4_897, channels=96, tiled_from=480 * 832 + 1, tile=(256, 256), stride=(192, 192)
    ),
)


class IndexFile(ModelIndex):
    """`model_index.json`; its keys, other than the class, tell Wan2.2 from Wan2.1."""

    transformer_2: tuple[str | None, ...] | None = None
    boundary_ratio: float | None = None
    expand_timesteps: bool = False


class TransformerFile(JsonFile):
    """The config of a WanTransformer3DModel; models that also take an image have the last two."""

    num_layers: int = Field(40, ge=1)
    num_attention_heads: int = Field(40, ge=1)
    attention_head_dim: int = Field(128, ge=1)
    in_channels: int = Field(16, ge=1)
    text_dim: int = Field(4096, ge=1)
    ffn_dim: int = Field(13824, ge=1)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_max_seq_len: int = Field(1024, ge=1)
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None


class VaeFile(JsonFile):
    """The config of an AutoencoderKLWan; only Wan2.2's has the last two."""

    latent_channels: int = Field(16, ge=1, alias="z_dim")
    base_dim: int = Field(96, ge=1)
    dim_mult: tuple[int, ...] = Field((1, 2, 4, 4), min_length=1)
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    scale_factor_spatial: int = Field(8, ge=1)
    scale_factor_temporal: int = Field(4, ge=1)
    is_residual: bool = False
    patch_size: int | None = None


class SchedulerFile(JsonFile):
    """The config of a UniPC scheduler, which has flow_shift, or of a flow-matching Euler one."""

    flow_shift: float | None = Field(None, gt=0)
    shift: float = Field(1.0, gt=0)


def _read(folder: Path, name: str) -> ModelFacts:
    index = read_json(folder / "model_index.json", IndexFile)
    transformer = read_json(folder / "transformer" / "config.json", TransformerFile)
    vae = read_json(folder / "vae" / "config.json", VaeFile)
    _check(index, transformer, vae, folder)
    encoder = read_json(folder / "text_encoder" / "config.json", TextEncoderFile)
    check_channels(
        folder,
        latent=(transformer.in_channels, vae.latent_channels),
        text=(transformer.text_dim, encoder.d_model),
    )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", SchedulerFile)
    shift = scheduler.shift if scheduler.flow_shift is None else scheduler.flow_shift
    return replace(_facts(transformer, vae, name=name, flow_shift=shift), folder=folder)


def _check(index: IndexFile, transformer: TransformerFile, vae: VaeFile, folder: Path) -> None:
    """Refuse, by name, members of the family other than a Wan2.1 that makes videos from text.

    Raises ModelSupportError, also if components contradict each other.
    """
    found = {
        "a transformer_2, so it is a Wan2.2 14B": any(index.transformer_2 or ()),
        f"boundary_ratio {index.boundary_ratio}, so it is a Wan2.2 14B": index.boundary_ratio,
        "expand_timesteps, so it is a Wan2.2 5B": index.expand_timesteps,
        "a VAE with is_residual, so it is a Wan2.2 5B": vae.is_residual,
        f"a VAE with patch_size {vae.patch_size}, so it is a Wan2.2 5B": vae.patch_size,
        f"image_dim {transformer.image_dim}, so it also takes an image": transformer.image_dim,
        f"added_kv_proj_dim {transformer.added_kv_proj_dim}, so it also takes an image": (
            transformer.added_kv_proj_dim
        ),
    }
    for what, is_there in found.items():
        if is_there:
            raise ModelSupportError(
                f"{folder}: has {what}: only Wan2.1 from text is supported; use "
                f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers or Wan-AI/Wan2.1-T2V-14B-Diffusers"
            )
    frames, height, width = transformer.patch_size
    if frames != 1 or height != width or height < 1:
        raise ModelSupportError(
            f"{folder}: has patch_size {list(transformer.patch_size)}: a token must be a square "
            f"of one latent frame, as [1, 2, 2] of the published Wan2.1"
        )
    ratios = (2 ** (len(vae.dim_mult) - 1), 2 ** sum(vae.temperal_downsample))
    if ratios != (vae.scale_factor_spatial, vae.scale_factor_temporal):
        raise ModelSupportError(
            f"{folder}: its VAE makes pixels {ratios[0]} and frames {ratios[1]} times fewer, but "
            f"its scale_factor_spatial is {vae.scale_factor_spatial} and its "
            f"scale_factor_temporal {vae.scale_factor_temporal}: correct its config.json"
        )


def _facts(
    transformer: TransformerFile,
    vae: VaeFile,
    *,
    name: str,
    flow_shift: float,
    dtype: Dtype = "float32",  # right for every folder
) -> ModelFacts:
    return ModelFacts(
        name=name,
        traits=TRAITS,
        folder=None,
        num_layers=transformer.num_layers,
        num_heads=transformer.num_attention_heads,
        head_dim=transformer.attention_head_dim,
        ffn_dim=transformer.ffn_dim,
        text_tokens=TEXT_TOKENS,
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
        attention=wan_attention(transformer.num_layers, PUBLISHED_SHIFT),
        max_grid=transformer.rope_max_seq_len,
        flow_shift=flow_shift,
    )


# --- published models ---------------------------------------------------------------------------


def _published() -> Mapping[str, ModelFacts]:
    """Sizes and shift: diffusers, scripts/convert_wan_to_diffusers.py.

    The numbers of weights are checked against the real classes by a test.
    """
    small = TransformerFile(num_layers=30, num_attention_heads=12, ffn_dim=8960)
    models = {
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (small, ComponentSize(1_418_996_800, 3_127_296)),
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": (
            TransformerFile(),
            ComponentSize(14_288_491_584, 29_184_000),
        ),
    }
    return {
        name: replace(
            _facts(transformer, VaeFile(), name=name, flow_shift=PUBLISHED_SHIFT, dtype="bfloat16"),
            sizes={
                "transformer": size,
                "vae": ComponentSize(126_892_531),
                "text_encoder": ComponentSize(5_680_910_336, 1_006_632_960),
            },
        )
        for name, (transformer, size) in models.items()
    }


FAMILY = Family(TRAITS, _read, _published())
