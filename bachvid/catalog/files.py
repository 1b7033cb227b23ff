"""The json files of a diffusers folder, as far as they are read. No torch, no diffusers.

What a file leaves out is the default of its diffusers class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.config import ModelConfig
from bachvid.inputs.strict_yaml import read_text, shown, validate

FileT = TypeVar("FileT", bound="JsonFile")


class JsonFile(BaseModel):
    """A file of which we read some keys."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ModelIndex(JsonFile):
    """`model_index.json`; all but the class tell Wan2.2 from Wan2.1."""

    class_name: str = Field(alias="_class_name")
    transformer_2: tuple[str | None, ...] | None = None
    boundary_ratio: float | None = None
    expand_timesteps: bool = False


class CogVideoXTransformerFile(JsonFile):
    """Of CogVideoXTransformer3DModel."""

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


class CogVideoXVaeFile(JsonFile):
    """Of AutoencoderKLCogVideoX."""

    latent_channels: int = Field(16, ge=1)
    block_out_channels: tuple[int, ...] = Field((128, 256, 256, 512), min_length=1)
    temporal_compression_ratio: int = Field(4, ge=1)


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


class TextEncoderFile(JsonFile):
    """Of T5EncoderModel or UMT5EncoderModel."""

    d_model: int = Field(ge=1)


def read_json(path: Path, model: type[FileT]) -> FileT:
    """Read a file of a model folder. Raises ModelSupportError if it is not what `model` says."""
    try:
        return validate(model, json.loads(read_text(path)), source=lambda _: str(path))
    except ConfigError as error:
        raise ModelSupportError(f"not a diffusers folder that can be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelSupportError(f"{path}: not JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class PartSize:
    """Values in the weights of a part; `kept` of them are kept in fp32 where it is in 16 bits."""

    values: int
    kept: int = 0

    def nbytes(self, width: int, *, keeps_fp32: bool = False) -> int:
        """Give the bytes of the part, loaded with `width` bytes for a value."""
        return self.values * width + (self.kept * (4 - width) if keeps_fp32 else 0)


def read_part_sizes(
    folder: Path, *, kept: Mapping[str, frozenset[str]]
) -> dict[str, PartSize] | None:
    """Count the weights of each part in `kept`, by the headers of its safetensors files.

    A tensor counts as kept if one of the words given for its part is in its dotted name. Gives
    None if a part has no such file. Raises ModelSupportError for a damaged one.
    """
    sizes = {}
    for part, words in kept.items():
        tensors: dict[str, int] = {}  # by name: variants of a file have the same names
        for path in sorted((folder / part).glob("*.safetensors")):
            tensors |= _tensor_sizes(path)
        if not tensors:
            return None
        fp32 = sum(n for name, n in tensors.items() if words & set(name.split(".")))
        sizes[part] = PartSize(sum(tensors.values()), fp32)
    return sizes


def _tensor_sizes(path: Path) -> dict[str, int]:
    """Give the number of values of each tensor: a file begins with the length of a JSON header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        header.pop("__metadata__", None)
        return {name: math.prod(tensor["shape"]) for name, tensor in header.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ModelSupportError(
            f"{path}: not a safetensors file ({type(error).__name__}): download the model again"
        ) from None


def check_cogvideox(transformer: CogVideoXTransformerFile, folder: Path) -> None:
    """Refuse CogVideoX 1.5. Raises ModelSupportError."""
    if transformer.patch_size_t is not None:
        raise ModelSupportError(
            f"{folder}: has patch_size_t {transformer.patch_size_t}, so it is a CogVideoX 1.5: "
            f"only 1.0 is supported; use CogVideoX-2b or CogVideoX-5b"
        )


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


def download_json(model: ModelConfig) -> Path:
    """Fetch the json files and the tokenizer of a Hub id. Raises ConfigError if that fails."""
    from huggingface_hub import snapshot_download  # half a second that nobody else should pay

    patterns = ["*.json", "tokenizer/*"]
    try:
        snapshot = snapshot_download(model.id, revision=model.revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:  # every error of the Hub's client is one of these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.id: is {shown(model.id)}: neither a folder here nor to be had from the Hub "
            f"({reason})"
        ) from None
    return Path(snapshot)
