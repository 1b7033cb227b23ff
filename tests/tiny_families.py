"""What tests must know of each family: the same behaviours are tested for all of them.

The stock pipelines are diffusers' own, on the same folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.attention.groups import ALONE
from bachvid.catalog.registry import load_facts
from bachvid.inputs.choices import Dtype, SchedulerName
from bachvid.inputs.sections import ModelConfig, ResolvedSampling, ResolvedVideo
from bachvid.models.base import VideoModel
from bachvid.models.registry import load_model
from bachvid.prompts.compose import compose_prompt

PROMPT = compose_prompt("a snowy forest", "a girl in a yellow dress", "jumps")
VIDEO = ResolvedVideo(pixel_frames=5, height=32, width=48)
SEED = 7

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class TinyFamily:
    """A tiny model, and what the stock code does with it.

    pipeline_class: of diffusers; `schedulers`: as the stock pipeline would have them, by our names.
    processors: the names of ours, by the last part of their path in a block, in order.
    stock_processor: the class that ours stand in for.
    decode, encode: the stock arithmetic between latents and pixels of the autoencoder.
    illegal: a height that is refused, with what the refusal says.
    tile, large: a tile, and a video that the test of tiles takes for large: height and width.
    """

    fixture: str
    pipeline_class: type[DiffusionPipeline]
    transformer_class: type[torch.nn.Module]
    schedulers: Mapping[SchedulerName, Callable[[Any], Any]]
    blocks: str
    processors: Mapping[str, str]
    stock_processor: type
    joint_text_tokens: int
    latent_axes: str
    decode: Callable[[Any, Tensor], Tensor]
    encode: Callable[[Any, Tensor], Tensor]
    illegal: tuple[int, str]
    tile: tuple[int, int]
    large: tuple[int, int]

    def stock(self, folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
        """Load the stock pipeline of a folder."""
        pipeline = self.pipeline_class.from_pretrained(folder, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def latents(self, height: int, width: int) -> Tensor:
        """Return latents of a video of VIDEO's length."""
        sizes = {"B": 1, "F": 3, "C": 4, "h": height // 4, "w": width // 4}
        generator = torch.Generator().manual_seed(0)
        return torch.randn([sizes[axis] for axis in self.latent_axes], generator=generator)

    def stock_pictures(self, pipeline: DiffusionPipeline, latents: Tensor) -> Pictures:
        """Decode as the stock pipeline does behind its last step."""
        with torch.no_grad():
            video = self.decode(pipeline.vae, latents)
        pictures = pipeline.video_processor.postprocess_video(video, output_type="pil")[0]
        return np.stack([np.asarray(picture) for picture in pictures])

    def stock_encoded(self, pipeline: DiffusionPipeline, frames: Pictures) -> Tensor:
        """Encode pictures as the stock pipelines from a video do, but for the mode."""
        pictures = [Image.fromarray(frame) for frame in frames]
        video = pipeline.video_processor.preprocess_video(pictures)
        with torch.no_grad():
            return self.encode(pipeline.vae, video)

    def stock_latents(
        self,
        folder: Path,
        *,
        scheduler: SchedulerName,
        guidance_scale: float,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Tensor:
        """Return what the stock pipeline makes of the prompt, from the seed, in four steps."""
        pipeline = self.stock(folder, dtype)
        pipeline.scheduler = self.schedulers[scheduler](pipeline.scheduler.config)
        latents: Tensor = pipeline(
            PROMPT.text,
            num_frames=VIDEO.pixel_frames,
            height=VIDEO.height,
            width=VIDEO.width,
            guidance_scale=guidance_scale,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            **{"num_inference_steps": 4, **options},
        ).frames
        return latents


def _cogvideox_encode(vae: Any, video_BCFHW: Tensor) -> Tensor:
    mode: Tensor = vae.encode(video_BCFHW).latent_dist.mode()
    scaling_factor: float = vae.config.scaling_factor
    return scaling_factor * mode.permute(0, 2, 1, 3, 4)


def _cogvideox_decode(vae: Any, latents: Tensor) -> Tensor:
    video: Tensor = vae.decode(
        1 / vae.config.scaling_factor * latents.permute(0, 2, 1, 3, 4)
    ).sample
    return video


def _wan_statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values).view(1, 4, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, 1.0 / std


def _wan_encode(vae: Any, video_BCFHW: Tensor) -> Tensor:
    mean, inverse_std = _wan_statistics(vae)
    mode: Tensor = vae.encode(video_BCFHW).latent_dist.mode()
    return (mode - mean) * inverse_std


def _wan_decode(vae: Any, latents: Tensor) -> Tensor:
    mean, inverse_std = _wan_statistics(vae)
    video: Tensor = vae.decode(latents / inverse_std + mean, return_dict=False)[0]
    return video


def _cogvideox(fixture: str) -> TinyFamily:
    return TinyFamily(
        fixture=fixture,
        pipeline_class=CogVideoXPipeline,
        transformer_class=CogVideoXTransformer3DModel,
        schedulers={
            "ddim": CogVideoXDDIMScheduler.from_config,
            "dpm": CogVideoXDPMScheduler.from_config,
        },
        blocks="transformer_blocks",
        processors={"attn1": "CogVideoXControlledProcessor"},
        stock_processor=CogVideoXAttnProcessor2_0,
        joint_text_tokens=16,
        latent_axes="BFChw",
        decode=_cogvideox_decode,
        encode=_cogvideox_encode,
        illegal=(36, "multiple of 8; nearest are 32 and 40"),
        tile=(24, 20),
        large=(32, 48),
    )


TINY_FAMILIES: dict[str, TinyFamily] = {
    "cogvideox": _cogvideox("tiny_cogvideox_folder"),
    "cogvideox_2b": _cogvideox("tiny_cogvideox_2b_folder"),
    "wan": TinyFamily(
        fixture="tiny_wan_folder",
        pipeline_class=WanPipeline,
        transformer_class=WanTransformer3DModel,
        schedulers={
            "unipc": UniPCMultistepScheduler.from_config,
            "euler": lambda config: FlowMatchEulerDiscreteScheduler(shift=config.flow_shift),
        },
        blocks="blocks",
        processors={"attn1": "WanSelfAttention", "attn2": "WanCrossAttention"},
        stock_processor=WanAttnProcessor,
        joint_text_tokens=0,
        latent_axes="BCFhw",
        decode=_wan_decode,
        encode=_wan_encode,
        illegal=(40, "multiple of 16; nearest are 32 and 48"),
        tile=(256, 256),  # its strides are those of the published autoencoder
        large=(32, 336),
    ),
}


def load_tiny(folder: Path, dtype: Dtype | None = None) -> VideoModel:
    config = ModelConfig(id=str(folder), device="cpu", dtype=dtype)
    return load_model(config, load_facts(config), ALONE)


def context_of(model: VideoModel, video: ResolvedVideo = VIDEO) -> RunContext:
    return RunContext(layout=model.layout(video), rotary=model.rotary(video))


def sampling_of(
    scheduler: SchedulerName, *, num_steps: int = 4, guidance_scale: float = 3.0
) -> ResolvedSampling:
    return ResolvedSampling(
        scheduler=scheduler, num_steps=num_steps, guidance_scale=guidance_scale, noise="same"
    )
