"""RenderConfig: everything about a render that is not the story. Pure data, no torch.

None stands for "as the model's profile says"; `resolve_config` leaves none of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bachvid.errors import ConfigError
from bachvid.inputs.story import NoisePolicy
from bachvid.inputs.strict_yaml import (
    Location,
    YamlValue,
    dotted,
    parse_mapping,
    parse_override,
    read_text,
    shown,
    validate,
)
from bachvid.inputs.words import clean_text

if TYPE_CHECKING:
    from bachvid.catalog.profiles import ProfileFacts
    from bachvid.catalog.registry import ModelFacts

Dtype = Literal["float32", "bfloat16", "float16"]
SchedulerName = Literal["ddim", "dpm", "unipc", "euler"]
Branches = Literal["both", "cond"]
MaskSoftmax = Literal["joint", "text"]
MaskWords = Literal["all", "nouns"]
MatchWithin = Literal["video", "foreground"]
PrePassInjection = Literal["background", "none"]
ProfileName = Literal["paper", "fast"]
CachePolicy = Literal["auto", "window", "retain"]
Offload = Literal["none", "model"]

INDECISIVE = ("output", "cache", "cluster", "parallel")  # sections that do not decide the pixels
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

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
            raise ValueError(f"is {shown(list(layers))}: list each layer once, in rising order")
        if layers == ():
            raise ValueError("is []: need at least one layer")
        return layers

    @field_validator("inject_steps", mode="before")
    @classmethod
    def _check_pair(cls, steps: object) -> object:
        if isinstance(steps, list) and len(steps) != 2:
            raise ValueError(f"is {shown(steps)}: must be two steps, [first, last)")
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
                raise ConfigError(f"{path}: {section}: is {shown(written)}: must be a mapping")
            written[key] = value
            origins[f"{section}.{key}"] = f"--set {override}"

        def source(location: Location) -> str:
            return origins.get(dotted(location[:2]), str(path))

        return validate(cls, values, source=source)


def resolve_config(config: RenderConfig, facts: ModelFacts) -> RenderConfig:
    """Fill what is None from the model and its profile, and check all of it against the model.

    The result has no None in video, sampling, method and output.fps. Raises ConfigError.
    """
    defaults = facts.defaults
    model = _filled(config.model, dtype=defaults.dtype)
    video = _filled(
        config.video,
        pixel_frames=defaults.pixel_frames,
        height=defaults.height,
        width=defaults.width,
    )
    assert video.pixel_frames is not None
    assert video.height is not None
    assert video.width is not None
    facts.grid(video.pixel_frames, video.height, video.width)
    sampling = _filled(
        config.sampling,
        scheduler=defaults.scheduler,
        num_steps=defaults.num_steps,
        guidance_scale=defaults.guidance_scale,
        noise=defaults.noise,
    )
    if facts.cleans_text:
        negative = clean_text(sampling.negative_prompt)
        sampling = sampling.model_copy(update={"negative_prompt": negative})
    assert sampling.num_steps
    if sampling.scheduler not in facts.schedulers:
        raise ConfigError(
            f"sampling.scheduler: is {shown(sampling.scheduler)}: {facts.name} is of the family "
            f"{facts.family}, which has {' and '.join(facts.schedulers)}"
        )
    method = _resolve_method(config.method, facts.profiles[config.method.profile], sampling)
    _check_method(method, facts, num_steps=sampling.num_steps)
    return RenderConfig(
        model=model,
        video=video,
        sampling=sampling,
        method=method,
        output=_filled(config.output, fps=defaults.fps),
        cache=config.cache,
        cluster=config.cluster,
        parallel=config.parallel,
    )


def config_hash(resolved: RenderConfig) -> str:
    """Give the SHA-256, in hex, of what decides the pixels: not where, how or to what files."""
    decisive = resolved.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(INDECISIVE, True),
            "model": {"device", "threads", "offload"},
            "method": {"profile"},
        },
    )
    canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_steps(method: MethodConfig) -> tuple[tuple[int, ...], ...]:
    """Give, for every run of a frame video, the steps whose identity keys and values it reads.

    `method` is resolved. The last run is the main run; those before it are pre-passes.
    """
    if method.name == "none":
        return ((),)
    assert method.inject_steps is not None
    assert method.mask_step is not None
    assert method.pre_passes is not None
    injected = tuple(range(*method.inject_steps))
    first = tuple(range(1, method.mask_step + 1))  # by the mask of the step before
    repeated = tuple(step for step in injected if step <= method.mask_step)
    return (
        first if method.pre_pass_injection == "background" else (),
        *[repeated] * (method.pre_passes - 1),
        injected,
    )


def recorded_steps(method: MethodConfig) -> tuple[int, ...]:
    """Give the steps of the identity video whose keys and values some run reads."""
    return tuple(sorted({step for steps in read_steps(method) for step in steps}))


def _filled(section: SectionT, **defaults: object) -> SectionT:
    missing = {key: value for key, value in defaults.items() if getattr(section, key) is None}
    return section.model_copy(update=missing)


def _resolve_method(
    method: MethodConfig, profile: ProfileFacts, sampling: SamplingConfig
) -> MethodConfig:
    steps = sampling.num_steps
    assert steps is not None
    first, last = (round(fraction * steps) for fraction in profile.inject_fraction)
    return _filled(
        method,
        vital_layers=profile.vital_layers,
        mask_layers=profile.mask_layers,
        match_layers=profile.match_layers,
        mask_step=min(round(profile.mask_fraction * steps), steps - 1),
        inject_steps=(first, max(last, first + 1)),
        branches=profile.branches,
        pre_passes=profile.pre_passes,
        pre_pass_injection=profile.pre_pass_injection,
        match_threshold=profile.match_threshold,
        mask_softmax=profile.mask_softmax,
        mask_words=profile.mask_words,
        match_within=profile.match_within,
    )


def _check_method(method: MethodConfig, facts: ModelFacts, *, num_steps: int) -> None:
    for key in ("vital_layers", "mask_layers", "match_layers"):
        layers: tuple[int, ...] = getattr(method, key)
        if layers[-1] >= facts.num_layers:
            raise ConfigError(
                f"method.{key}: has layer {layers[-1]}: {facts.name} has {facts.num_layers} "
                f"layers, 0 to {facts.num_layers - 1}"
            )
    assert method.mask_step is not None
    assert method.inject_steps is not None
    if method.mask_step >= num_steps:
        raise ConfigError(
            f"method.mask_step: is {method.mask_step}: with sampling.num_steps {num_steps} "
            f"the last step is {num_steps - 1}"
        )
    if method.inject_steps[1] > num_steps:
        raise ConfigError(
            f"method.inject_steps: is {list(method.inject_steps)}: it must end at "
            f"sampling.num_steps, {num_steps}, or before"
        )
    assert method.pre_passes is not None
    if method.pre_passes > 1 and method.inject_steps[0] > method.mask_step:
        raise ConfigError(
            f"method.pre_passes: is {method.pre_passes}: a pre-pass ends with method.mask_step "
            f"{method.mask_step}, before anything is injected (method.inject_steps "
            f"{list(method.inject_steps)}), so a second one would repeat the first; set it to 1"
        )
