"""What a model is, read from the json files of its folder: no torch, no diffusers, no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from bachvid.catalog.families import FAMILIES, Family
from bachvid.catalog.files import (
    CogVideoXTransformerFile,
    CogVideoXVaeFile,
    JsonFile,
    ModelIndex,
    TextEncoderFile,
    WanTransformerFile,
    WanVaeFile,
    check_cogvideox,
    check_wan,
    download_json,
    read_json,
)
from bachvid.catalog.profiles import DefaultFacts, ProfileFacts, cogvideox_profiles, wan_profiles
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.config import Dtype, ModelConfig, SchedulerName, VideoConfig
from bachvid.inputs.strict_yaml import did_you_mean, shown
from bachvid.layout.gangs import Branch
from bachvid.layout.tokens import TokenLayout

STORYBOOK_ID = "storybook"
STORYBOOK_FOLDER = Path(__file__).parents[1] / "storybook" / "weights"
EMBEDDED: Mapping[str, Path] = {
    STORYBOOK_ID: STORYBOOK_FOLDER,
    "storybook-wan": Path(__file__).parents[1] / "storybook" / "wan_weights",
}


class Vocabulary(BaseModel):
    """The phrases that a model was trained on, where those are all that it understands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    background: tuple[str, ...]
    character: tuple[str, ...]
    action: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The sizes and defaults of one model. `folder` is None for a Hub model not downloaded."""

    name: str
    family: Family
    folder: Path | None
    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int  # channels within a feed-forward
    text_tokens: int  # the length that every prompt is padded to
    text_dim: int
    has_rope: bool
    patch_size: int  # latents per token, along height and width; along time it is 1
    latent_channels: int
    vae_channels: int  # of the autoencoder's layers at full resolution
    spatial_ratio: int  # pixels per latent, along height and width
    temporal_ratio: int  # pixel frames per latent frame, after the first
    defaults: DefaultFacts
    profiles: Mapping[str, ProfileFacts]
    max_grid: int | None = None  # tokens along each axis that there are positions for
    vocabulary: Vocabulary | None = None

    @property
    def schedulers(self) -> tuple[SchedulerName, ...]:
        """The schedulers that the family has."""
        return FAMILIES[self.family].schedulers

    @property
    def passes(self) -> tuple[tuple[Branch, ...], ...]:
        """The forwards of one guided step, in their order, by the CFG branches that share one."""
        return FAMILIES[self.family].passes

    @property
    def cleans_text(self) -> bool:
        """Whether prompts are cleaned before they are tokenized."""
        return FAMILIES[self.family].cleans_text

    @property
    def joint_text_tokens(self) -> int:
        """Text tokens in the video's own attention; 0 where text has an attention of its own."""
        return self.text_tokens if FAMILIES[self.family].has_joint_text else 0

    def layout(self, video: VideoConfig) -> TokenLayout:
        """Give the token layout of a resolved config. Raises ConfigError for an illegal size."""
        assert video.pixel_frames is not None
        assert video.height is not None
        assert video.width is not None
        grid = self.grid(video.pixel_frames, video.height, video.width)
        return TokenLayout(self.joint_text_tokens, *grid)

    def grid(self, pixel_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Give the token grid (latent_frames, grid_height, grid_width) of a video.

        Raises ConfigError with the nearest legal values.
        """
        frame_stride = self.temporal_ratio
        if (pixel_frames - 1) % frame_stride:
            nearest = _nearest(pixel_frames - 1, frame_stride, first=0)
            raise ConfigError(
                f"video.pixel_frames: is {pixel_frames}: must be 1 more than a multiple of "
                f"{frame_stride}; nearest are {' and '.join(str(n + 1) for n in nearest)}"
            )
        stride = math.lcm(FAMILIES[self.family].size_step, self.spatial_ratio * self.patch_size)
        for name, size in (("height", height), ("width", width)):
            if size % stride:
                nearest = _nearest(size, stride, first=stride)
                raise ConfigError(
                    f"video.{name}: is {size}: must be a multiple of {stride}; "
                    f"nearest are {' and '.join(map(str, nearest))}"
                )
        token_pixels = self.spatial_ratio * self.patch_size
        latent_frames = (pixel_frames - 1) // frame_stride + 1
        grid = latent_frames, height // token_pixels, width // token_pixels
        for name, tokens in zip(("pixel_frames", "height", "width"), grid, strict=True):
            if self.max_grid is not None and tokens > self.max_grid:
                raise ConfigError(
                    f"video.{name}: makes {tokens} tokens along this axis: {self.name} has "
                    f"positions for {self.max_grid}; choose a smaller video"
                )
        return grid


def load_facts(model: ModelConfig) -> ModelFacts:
    """Give the facts of an embedded model, a folder, or a Hub id.

    The published models need no network; of another Hub id the json files are downloaded.
    Raises ConfigError if `model.id` names nothing, ModelSupportError if not a model that we run.
    """
    if model.id in EMBEDDED:
        return read_facts(EMBEDDED[model.id], name=model.id)
    if model.id in PUBLISHED:
        return PUBLISHED[model.id]
    folder = Path(model.id)
    if folder.is_dir():
        return read_facts(folder, name=folder.resolve().name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model.id):
        guess = did_you_mean(model.id, [*EMBEDDED, *PUBLISHED])
        raise ConfigError(
            f"model.id: is {shown(model.id)}: must be {' or '.join(map(repr, EMBEDDED))}, a folder "
            f"that exists, or a Hub id as 'THUDM/CogVideoX-5b'.{guess}"
        )
    return read_facts(download_json(model), name=model.id)


def read_facts(folder: Path, *, name: str) -> ModelFacts:
    """Read the facts of a diffusers folder. Raises ModelSupportError if we cannot run it."""
    index = read_json(folder / "model_index.json", ModelIndex)
    pipelines = {traits.pipeline: family for family, traits in FAMILIES.items()}
    if index.class_name not in pipelines:
        raise ModelSupportError(
            f"{folder}: is a {index.class_name}: only {' and '.join(pipelines)}, which make videos "
            f"from text, are supported"
        )
    transformer_path = folder / "transformer" / "config.json"
    vae_path = folder / "vae" / "config.json"
    vae: CogVideoXVaeFile | WanVaeFile
    if pipelines[index.class_name] == "cogvideox":
        transformer = read_json(transformer_path, CogVideoXTransformerFile)
        check_cogvideox(transformer, folder)
        vae = read_json(vae_path, CogVideoXVaeFile)
        facts = _cogvideox_facts(transformer, vae, name=name, folder=folder)
    else:
        wan_transformer = read_json(transformer_path, WanTransformerFile)
        vae = read_json(vae_path, WanVaeFile)
        check_wan(index, wan_transformer, vae, folder)
        facts = _wan_facts(wan_transformer, vae, name=name, folder=folder)
    encoder = read_json(folder / "text_encoder" / "config.json", TextEncoderFile)
    if (vae.latent_channels, encoder.d_model) != (facts.latent_channels, facts.text_dim):
        raise ModelSupportError(
            f"{folder}: its parts do not fit: the transformer takes {facts.latent_channels} latent "
            f"and {facts.text_dim} text channels, the VAE gives {vae.latent_channels} and the "
            f"text encoder {encoder.d_model}"
        )
    return _with_own_facts(facts, folder / "storybook.json")


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
        profiles=cogvideox_profiles(transformer.num_layers),
    )


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
        profiles=wan_profiles(transformer.num_layers),
        max_grid=transformer.rope_max_seq_len,
    )


class _StorybookFile(JsonFile):
    text_tokens: int | None = Field(None, ge=1)  # only where no file of diffusers says it
    vocabulary: Vocabulary | None = None
    defaults: DefaultFacts
    profiles: Mapping[str, ProfileFacts]


def _with_own_facts(facts: ModelFacts, path: Path) -> ModelFacts:
    """Give `facts` with what stands in a file of ours, where a folder has one."""
    if not path.exists():
        return facts
    own = read_json(path, _StorybookFile)
    if own.text_tokens is not None and facts.family != "wan":
        raise ModelSupportError(
            f"{path}: text_tokens: is {own.text_tokens}: only a Wan model can choose it; for "
            f"{facts.family} the transformer's max_text_seq_length says it, {facts.text_tokens}"
        )
    return replace(
        facts,
        text_tokens=own.text_tokens or facts.text_tokens,
        defaults=own.defaults,
        profiles=own.profiles,
        vocabulary=own.vocabulary,
    )


def _nearest(value: int, stride: int, *, first: int) -> list[int]:
    below = value // stride * stride
    return [legal for legal in (below, below + stride) if legal >= first]


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

# Source: diffusers, scripts/convert_wan_to_diffusers.py, get_transformer_config.
_WAN_TRANSFORMERS: Mapping[str, WanTransformerFile] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": WanTransformerFile(
        num_layers=30, num_attention_heads=12, ffn_dim=8960
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": WanTransformerFile(),
}

PUBLISHED: Mapping[str, ModelFacts] = {
    f"{owner}/{name}": _cogvideox_facts(
        transformer, CogVideoXVaeFile(), name=f"{owner}/{name}", folder=None, dtype=dtype
    )
    for name, (transformer, dtype) in _COGVIDEOX_TRANSFORMERS.items()
    for owner in ("THUDM", "zai-org")  # both spellings are in use
} | {
    name: _wan_facts(transformer, WanVaeFile(), name=name, folder=None, dtype="bfloat16")
    for name, transformer in _WAN_TRANSFORMERS.items()
}
