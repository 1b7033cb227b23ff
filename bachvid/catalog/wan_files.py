"""t"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from bachvid.catalog.files import JsonFile, ModelIndex
from bachvid.errors import ModelSupportError


class WanTransformerFile(JsonFile):
    """Of WanTransformer3DModel; the last two are those of models that also take an image."""

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


class WanVaeFile(JsonFile):
    """Of AutoencoderKLWan; the last two are those of Wan2.2's."""

    latent_channels: int = Field(16, ge=1, alias="z_dim")
    base_dim: int = Field(96, ge=1)
    dim_mult: tuple[int, ...] = Field((1, 2, 4, 4), min_length=1)
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    scale_factor_spatial: int = Field(8, ge=1)
    scale_factor_temporal: int = Field(4, ge=1)
    is_residual: bool = False
    patch_size: int | None = None


def check_wan(
    index: ModelIndex, transformer: WanTransformerFile, vae: WanVaeFile, folder: Path
) -> None:
    """Refuse by name what is of the family, but not a Wan2.1 that makes videos from text.

    Raises ModelSupportError, also for parts that contradict each other.
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
