"""The sections of a config that belong to no method: as written, and resolved. No torch.

As written, None means "use the model's value". `bachvid.planning.resolve` turns a written section
into a resolved one, which has the same keys, and no None where a render needs a value.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from bachvid.inputs.choices import CachePolicy, Dtype, Offload, SchedulerName
from bachvid.inputs.story import NoisePolicy

SectionT = TypeVar("SectionT", bound="Section")

# YAML has lists, not tuples; what stands in them is checked as strictly as the rest.
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
Steps = Annotated[tuple[int, int], Field(strict=False)]
Count = Annotated[int, Field(ge=1)]
Step = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen section of a config; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which model, and how it is held. `id`: "storybook", a Hub id or a diffusers folder."""

    id: Annotated[str, Field(min_length=1)] = "storybook"
    revision: str | None = None
    dtype: Dtype | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None  # of torch within one operation, on CPU only
    offload: Offload = "none"  # "model": only the component in use is on the GPU


class ResolvedModel(ModelConfig):
    """The resolved model, with its dtype."""

    dtype: Dtype


class VideoConfig(Section):
    """The size of a video in pixels, before any enlargement."""

    pixel_frames: Count | None = None
    height: Count | None = None
    width: Count | None = None


class ResolvedVideo(VideoConfig):
    """The resolved size of a video in pixels."""

    pixel_frames: Count
    height: Count
    width: Count


class SamplingConfig(Section):
    """The denoising loop. `noise`: one for all videos of a scene, or one for each video."""

    scheduler: SchedulerName | None = None
    num_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=1, le=100)] | None = None
    noise: NoisePolicy | None = None
    negative_prompt: str = ""


class ResolvedSampling(SamplingConfig):
    """The resolved denoising loop."""

    scheduler: SchedulerName
    num_steps: Annotated[int, Field(ge=1, le=1000)]
    guidance_scale: Annotated[float, Field(ge=1, le=100)]
    noise: NoisePolicy


class OutputConfig(Section):
    """What is written. Nothing here changes what is rendered."""

    min_height: Annotated[int, Field(ge=1, le=8192)] = 320  # small videos are enlarged to it
    fps: Annotated[int, Field(ge=1, le=120)] | None = None
    crf: Annotated[int, Field(ge=0, le=51)] = 16  # of H.264: 0 is lossless, 51 worst
    frames: bool = False  # keep raw frames and masks as .npz
    overlays: bool = True
    preview_every: Count | None = None  # steps; each preview costs one decoding


class ResolvedOutput(OutputConfig):
    """What is written, with the resolved frame rate."""

    fps: Annotated[int, Field(ge=1, le=120)]


class CacheConfig(Section):
    """How long the pieces of an identity video are kept. Nothing here changes a pixel."""

    policy: CachePolicy = "auto"
    window: Count = 4  # steps of one scene kept at once, under the policy `window`
    spill_gb: Annotated[float, Field(ge=0)] = 0  # of every node's disk, for caches under `retain`
    directory: Annotated[str, Field(min_length=1)] | None = None  # to keep the caches in, as files


class ClusterConfig(Section):
    """What is asked of a Ray cluster. Nothing here changes a pixel."""

    workers: Count | None = None  # None: as many as the cluster has room for
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] | None = None  # None: 1 if there are GPUs
    wait_seconds: Annotated[float, Field(ge=0)] = 60  # for a worker to find room and start


class ParallelConfig(Section):
    """GPUs (processes on CPUs) that share one video. Results agree to rounding."""

    identity_gpus: Count = 1  # of an identity video
    gpus_per_frame_actor: Count = 1
    cfg: Literal[1, 2] = 1  # 2: half of them compute the unconditional branch, half the other


def resolved_section(section: Section, resolved: type[SectionT], **defaults: object) -> SectionT:
    """Return `section` as its resolved class, with `defaults` in place of None."""
    written = {key: value for key, value in section if value is not None}
    return resolved(**{**defaults, **written})
