"""t"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from bachvid.catalog.files import JsonFile
from bachvid.errors import ModelSupportError


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


def check_cogvideox(transformer: CogVideoXTransformerFile, folder: Path) -> None:
    """Refuse CogVideoX 1.5. Raises ModelSupportError."""
    if transformer.patch_size_t is not None:
        raise ModelSupportError(
            f"{folder}: has patch_size_t {transformer.patch_size_t}, so it is a CogVideoX 1.5: "
            f"only 1.0 is supported; use CogVideoX-2b or CogVideoX-5b"
        )
