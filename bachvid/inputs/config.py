"""RenderConfig: everything about a render that is not the story. Pure data, no torch.

None stands for "as the model's profile says"; `resolve_config` leaves none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bachvid.errors import ConfigError
from bachvid.inputs.story import NoisePolicy
from bachvid.inputs.strict_yaml import (
    Location,
    YamlValue,
    format_path,
    parse_mapping,
    parse_override,
    quote,
    read_text,
    validate,
)

if TYPE_CHECKING:
    pass

from bachvid.inputs.choices import (
    Branches,
    CachePolicy,
    Dtype,
    MaskSoftmax,
    MaskWords,
    MatchWithin,
    Offload,
    PrePassInjection,
    ProfileName,
    SchedulerName,
)

SectionT = TypeVar("SectionT", bound="_Section")

# YAML has lists, not tuples; what stands in them is checked as strictly as the rest.
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
Steps = Annotated[tuple[int, int], Field(strict=False)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Which model, and how it is held. `id`: "storybook", a Hub id or a diffusers folder."""

    id: Annotated[str, Field(min_length=1)] = "storybook"
    revision: str | None = None
    dtype: Dtype | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None  # of torch within one operation, on CPU only
    offload: Offload = "none"  # model: on the GPU is only the part that works


class VideoConfig(_Section):
    """The size of a video in pixels, before any enlargement."""

    pixel_frames: Count | None = None
    height: Count | None = None
    width: Count | None = None


class SamplingConfig(_Section):
    """The denoising loop. `noise`: the same for all videos of a scene, or each its own."""

    scheduler: SchedulerName | None = None
    num_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=1, le=100)] | None = None
    noise: NoisePolicy | None = None
    negative_prompt: str = ""


class MethodConfig(_Section):
    """What is recorded and injected. Layers and steps count from 0; ranges are half-open."""

    name: Literal["bachvid", "none"] = "bachvid"
    profile: ProfileName = "fast"
    vital_layers: Layers | None = None
    mask_layers: Layers | None = None
    match_layers: Layers | None = None
    mask_step: Annotated[int, Field(ge=0)] | None = None
    inject_steps: Steps | None = None  # [first, last)
    branches: Branches | None = None
    pre_passes: Count | None = None  # each but the first injects what the one before it found
    pre_pass_injection: PrePassInjection | None = None  # in the first one
    match_threshold: Annotated[float, Field(ge=-1, le=1)] | None = None  # cosine similarity
    mask_softmax: MaskSoftmax | None = None
    mask_words: MaskWords | None = None  # nouns: the story's, or all but function words
    match_within: MatchWithin | None = None
    morphology: bool = False
    on_empty_mask: Literal["adapt", "fail"] = "adapt"

    @field_validator("vital_layers", "mask_layers", "match_layers")
    @classmethod
    def _check_layers(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and list(layers) != sorted(set(layers)):
            raise ValueError(f"is {quote(list(layers))}: list each layer once, in rising order")
        if layers == ():
            raise ValueError("is []: need at least one layer")
        return layers

    @field_validator("inject_steps", mode="before")
    @classmethod
    def _check_pair(cls, steps: object) -> object:
        if isinstance(steps, list) and len(steps) != 2:
            raise ValueError(f"is {quote(steps)}: must be two steps, [first, last)")
        return steps

    @field_validator("inject_steps")
    @classmethod
    def _check_steps(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 0 <= steps[0] < steps[1]:
            raise ValueError(f"is {list(steps)}: need 0 <= first < last")
        return steps


class OutputConfig(_Section):
    """What is written. Nothing here changes what is rendered."""

    min_height: Annotated[int, Field(ge=1, le=8192)] = 320  # small videos are enlarged to it
    fps: Annotated[int, Field(ge=1, le=120)] | None = None
    crf: Annotated[int, Field(ge=0, le=51)] = 16  # of H.264: 0 is lossless, 51 worst
    frames: bool = False  # keep raw frames and masks as .npz
    overlays: bool = True
    preview_every: Count | None = None  # steps; each preview costs one decoding


class CacheConfig(_Section):
    """How long keys and values of an identity video are kept. Nothing here changes a pixel."""

    policy: CachePolicy = "auto"
    window: Count = 4  # steps of one scene kept at once, under the policy `window`
    spill_gb: Annotated[float, Field(ge=0)] = 0  # of every node's disk, for caches under `retain`
    directory: Annotated[str, Field(min_length=1)] | None = None  # to keep the caches in, as files


class ClusterConfig(_Section):
    """What is asked of a Ray cluster. Nothing here changes a pixel."""

    workers: Count | None = None  # None: as many as the cluster has room for
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] | None = None  # None: 1 if there are GPUs
    wait_seconds: Annotated[float, Field(ge=0)] = 60  # for a worker to find room and start


class ParallelConfig(_Section):
    """How many GPUs, or on CPUs processes, share one video: no more than its last bits change."""

    identity_gpus: Count = 1  # of an identity video
    gpus_per_frame_actor: Count = 1
    cfg: Literal[1, 2] = 1  # 2: half of them compute the unconditional branch, half the other


class RenderConfig(_Section):
    """The whole config, one section for each owner."""

    model: ModelConfig = ModelConfig()
    video: VideoConfig = VideoConfig()
    sampling: SamplingConfig = SamplingConfig()
    method: MethodConfig = MethodConfig()
    output: OutputConfig = OutputConfig()
    cache: CacheConfig = CacheConfig()
    cluster: ClusterConfig = ClusterConfig()
    parallel: ParallelConfig = ParallelConfig()

    @classmethod
    def from_yaml(cls, path: Path | None, overrides: Sequence[str] = ()) -> RenderConfig:
        """Read a config; each of `overrides` is `section.key=value`, the value in YAML.

        Raises ConfigError with one line per problem, naming the file or the override.
        """
        values: dict[object, YamlValue] = {}
        if path is not None:
            values = parse_mapping(read_text(path), source=str(path), keys=list(cls.model_fields))
        origins: dict[str, str] = {}
        for override in overrides:
            section, key, value = parse_override(override, cls)
            written = values.setdefault(section, {})
            if not isinstance(written, dict):
                raise ConfigError(f"{path}: {section}: is {quote(written)}: must be a mapping")
            written[key] = value
            origins[f"{section}.{key}"] = f"--set {override}"

        def source(location: Location) -> str:
            return origins.get(format_path(location[:2]), str(path))

        return validate(cls, values, source=source)
