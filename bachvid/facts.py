"""What a model is, read from the json files of its folder: no torch, no diffusers, no weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from bachvid.config import (
    Branches,
    Dtype,
    MaskSoftmax,
    MatchWithin,
    ModelConfig,
    PrePassInjection,
    SchedulerName,
)
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.story import NoisePolicy
from bachvid.strict_yaml import did_you_mean, read_text, shown, validate

STORYBOOK_ID = "storybook"
STORYBOOK_FOLDER = Path(__file__).parent / "storybook" / "weights"

FileT = TypeVar("FileT", bound="_JsonFile")


class ProfileFacts(BaseModel):
    """A named way to run the method on one model. Layers count from 0; fractions are of steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vital_layers: tuple[int, ...]
    mask_layers: tuple[int, ...]
    match_layers: tuple[int, ...]
    mask_fraction: float = Field(ge=0, lt=1)
    inject_fraction: tuple[float, float]
    branches: Branches
    pre_passes: int = Field(1, ge=1)
    pre_pass_injection: PrePassInjection
    match_threshold: float = Field(0.5, ge=-1, le=1)
    mask_softmax: MaskSoftmax = "joint"
    match_within: MatchWithin = "video"


class DefaultFacts(BaseModel):
    """What a config takes that says nothing. `seconds_per_forward` was measured on 2 CPU cores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pixel_frames: int
    height: int
    width: int
    fps: int
    num_steps: int
    guidance_scale: float
    scheduler: SchedulerName
    dtype: Dtype
    noise: NoisePolicy
    seconds_per_forward: float | None = None


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
    family: Literal["cogvideox"]
    folder: Path | None
    num_layers: int
    num_heads: int
    head_dim: int
    text_tokens: int  # the length that every prompt is padded to
    text_dim: int
    has_rope: bool
    patch_size: int
    patch_size_t: int | None  # None in every CogVideoX 1.0
    latent_channels: int
    spatial_ratio: int  # pixels per latent, along height and width
    temporal_ratio: int  # pixel frames per latent frame, after the first
    defaults: DefaultFacts
    profiles: Mapping[str, ProfileFacts]
    vocabulary: Vocabulary | None = None

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
        # The stock pipeline refuses sizes that 8 does not divide, whatever the VAE could do.
        stride = math.lcm(8, self.spatial_ratio * self.patch_size)
        for name, size in (("height", height), ("width", width)):
            if size % stride:
                nearest = _nearest(size, stride, first=stride)
                raise ConfigError(
                    f"video.{name}: is {size}: must be a multiple of {stride}; "
                    f"nearest are {' and '.join(map(str, nearest))}"
                )
        token_pixels = self.spatial_ratio * self.patch_size
        latent_frames = (pixel_frames - 1) // frame_stride + 1
        return latent_frames, height // token_pixels, width // token_pixels


def load_facts(model: ModelConfig) -> ModelFacts:
    """Give the facts of the embedded model, a folder, or a Hub id.

    The published CogVideoX need no network; of another Hub id the json files are downloaded.
    Raises ConfigError if `model.id` names nothing, ModelSupportError if not a model that we run.
    """
    if model.id == STORYBOOK_ID:
        return read_facts(STORYBOOK_FOLDER, name=STORYBOOK_ID)
    if model.id in PUBLISHED:
        return PUBLISHED[model.id]
    folder = Path(model.id)
    if folder.is_dir():
        return read_facts(folder, name=folder.resolve().name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model.id):
        guess = did_you_mean(model.id, [STORYBOOK_ID, *PUBLISHED])
        raise ConfigError(
            f"model.id: is {shown(model.id)}: must be {STORYBOOK_ID!r}, a folder that exists, "
            f"or a Hub id as 'THUDM/CogVideoX-5b'.{guess}"
        )
    return read_facts(_download_json(model), name=model.id)


def read_facts(folder: Path, *, name: str) -> ModelFacts:
    """Read the facts of a diffusers folder. Raises ModelSupportError if it is not CogVideoX."""
    index = _read_json(folder / "model_index.json", _ModelIndex)
    if index.class_name != "CogVideoXPipeline":
        raise ModelSupportError(
            f"{folder}: is a {index.class_name}: only CogVideoXPipeline, which makes videos from "
            f"text, is supported"
        )
    transformer = _read_json(folder / "transformer" / "config.json", _TransformerFile)
    vae = _read_json(folder / "vae" / "config.json", _VaeFile)
    encoder = _read_json(folder / "text_encoder" / "config.json", _TextEncoderFile)
    if transformer.patch_size_t is not None:
        raise ModelSupportError(
            f"{folder}: has patch_size_t {transformer.patch_size_t}, so it is a CogVideoX 1.5: "
            f"only 1.0 is supported; use CogVideoX-2b or CogVideoX-5b"
        )
    if (
        transformer.in_channels != vae.latent_channels
        or encoder.d_model != transformer.text_embed_dim
    ):
        raise ModelSupportError(
            f"{folder}: its parts do not fit: the transformer takes {transformer.in_channels} "
            f"latent and {transformer.text_embed_dim} text channels, the VAE gives "
            f"{vae.latent_channels} and the text encoder {encoder.d_model}"
        )
    return _assemble(transformer, vae, name=name, folder=folder)


def _assemble(
    transformer: _TransformerFile, vae: _VaeFile, *, name: str, folder: Path | None
) -> ModelFacts:
    spatial_ratio = 2 ** (len(vae.block_out_channels) - 1)
    facts = ModelFacts(
        name=name,
        family="cogvideox",
        folder=folder,
        num_layers=transformer.num_layers,
        num_heads=transformer.num_attention_heads,
        head_dim=transformer.attention_head_dim,
        text_tokens=transformer.max_text_seq_length,
        text_dim=transformer.text_embed_dim,
        has_rope=transformer.use_rotary_positional_embeddings,
        patch_size=transformer.patch_size,
        patch_size_t=transformer.patch_size_t,
        latent_channels=vae.latent_channels,
        spatial_ratio=spatial_ratio,
        temporal_ratio=vae.temporal_compression_ratio,
        defaults=DefaultFacts(
            pixel_frames=transformer.sample_frames,
            height=transformer.sample_height * spatial_ratio,
            width=transformer.sample_width * spatial_ratio,
            fps=8,
            num_steps=50,
            guidance_scale=6.0,
            scheduler="ddim",
            dtype="float32",  # right for every folder; those published name their own below
            noise="same",
        ),
        profiles=_scaled_profiles(transformer.num_layers),
    )
    own = folder / "storybook.json" if folder else None
    if own is None or not own.exists():
        return facts
    storybook = _read_json(own, _StorybookFile)
    return replace(
        facts,
        defaults=storybook.defaults,
        profiles=storybook.profiles,
        vocabulary=storybook.vocabulary,
    )


def _nearest(value: int, stride: int, *, first: int) -> list[int]:
    below = value // stride * stride
    return [legal for legal in (below, below + stride) if legal >= first]


# --- the files of a diffusers folder; what a file leaves out is its class's default --------------


class _JsonFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _ModelIndex(_JsonFile):
    class_name: str = Field(alias="_class_name")


class _TransformerFile(_JsonFile):
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


class _VaeFile(_JsonFile):
    latent_channels: int = Field(16, ge=1)
    block_out_channels: tuple[int, ...] = Field((128, 256, 256, 512), min_length=1)
    temporal_compression_ratio: int = Field(4, ge=1)


class _TextEncoderFile(_JsonFile):
    d_model: int = Field(ge=1)


class _StorybookFile(_JsonFile):
    vocabulary: Vocabulary | None = None
    defaults: DefaultFacts
    profiles: Mapping[str, ProfileFacts]


def _read_json(path: Path, model: type[FileT]) -> FileT:
    try:
        return validate(model, json.loads(read_text(path)), source=lambda _: str(path))
    except ConfigError as error:
        raise ModelSupportError(f"not a diffusers folder that can be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelSupportError(f"{path}: not JSON: {error}") from None


def _download_json(model: ModelConfig) -> Path:
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


# --- published models ---------------------------------------------------------------------------

_PAPER_DEPTH = 42  # layers of CogVideoX-5b, whose layer sets BachVid publishes


def _scaled_profiles(num_layers: int) -> dict[str, ProfileFacts]:
    """Give both profiles for a CogVideoX of `num_layers`.

    The layers are those of the paper, counted from 0: as published for 42 layers. For another
    depth none are published; there we take the layers at the same relative depth.
    Source: BachVid (arXiv 2510.21696v1), Sec. 3.2-3.4 and App. B.
    """

    def at_depth(*layers: int) -> tuple[int, ...]:
        scale = (num_layers - 1) / (_PAPER_DEPTH - 1)
        return tuple(sorted({round(layer * scale) for layer in layers}))

    paper = ProfileFacts(
        vital_layers=at_depth(0, 1, 11, 12, 13, 14, 15, 17, 19, 20, 21, 23, 29, 34, 41),
        mask_layers=at_depth(*range(5, 20)),
        match_layers=at_depth(*range(1, 16)),
        mask_fraction=5 / 50,
        inject_fraction=(0.0, 0.52),
        branches="both",
        pre_pass_injection="background",
    )
    fast = paper.model_copy(
        update={"inject_fraction": (0.0, 1.0), "branches": "cond", "pre_pass_injection": "none"}
    )
    return {"paper": paper, "fast": fast}


def _published(name: str) -> dict[str, ModelFacts]:
    """Give the facts of a published model under both spellings of its Hub id."""
    transformer, dtype = _TRANSFORMERS[name]
    found: dict[str, ModelFacts] = {}
    for hub_id in (f"THUDM/{name}", f"zai-org/{name}"):
        facts = _assemble(transformer, _VaeFile(), name=hub_id, folder=None)
        found[hub_id] = replace(facts, defaults=facts.defaults.model_copy(update={"dtype": dtype}))
    return found


# Source: diffusers, scripts/convert_cogvideox_to_diffusers.py, get_transformer_init_kwargs.
_TRANSFORMERS: Mapping[str, tuple[_TransformerFile, Dtype]] = {
    "CogVideoX-2b": (_TransformerFile(), "float16"),
    "CogVideoX-5b": (
        _TransformerFile(
            num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True
        ),
        "bfloat16",
    ),
}

PUBLISHED: Mapping[str, ModelFacts] = _published("CogVideoX-2b") | _published("CogVideoX-5b")
