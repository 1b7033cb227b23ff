"""CogVideoX (2b, 5b and models trained like them) on the diffusers classes, which stay as they are.

Gives, for the same inputs, what the stock diffusers pipeline gives, bit by bit. It must not know
what a control does. Shapes: B batch, F latent frames, P prompts, T text tokens, S joint tokens
[text | video], N video tokens, H heads, D channels per head, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import Tensor
from transformers import T5EncoderModel
from transformers.utils import logging as transformers_logging

from bachvid.attention import (
    ALONE,
    QKV,
    AttentionControl,
    Rotary,
    RunContext,
    SequenceGroup,
    controlled_attention,
)
from bachvid.config import ModelConfig, VideoConfig
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.facts import STORYBOOK_ID, ModelFacts
from bachvid.models.base import (
    Scheduler,
    choose_device,
    choose_dtype,
    load_component,
    shard_tokens,
)
from bachvid.prompts import Prompt, PromptTokenizer
from bachvid.tokens import TokenLayout

Component = TypeVar(
    "Component", CogVideoXTransformer3DModel, AutoencoderKLCogVideoX, T5EncoderModel
)

SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}

# An untiled decode needs about 50 KB per pixel in 16 bits (17.8 GB at 480x720, says diffusers'
# own estimate): from here on, the decoder works on overlapping tiles. Their size is that of the
# published models. Others need not do: tiled_decode rounds, and pixel rows double or get lost.
TILED_FROM_PIXELS = 320 * 480
TILE_HEIGHT, TILE_WIDTH = 240, 360


class CogVideoXControlledProcessor:
    """CogVideoX attention of one layer with one seam, before RoPE. Keeps no state."""

    def __init__(self, layer: int, run: RunContext, control: AttentionControl) -> None:
        self.layer = layer
        self.run = run
        self.control = control

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,  # the same table as run.rotary
    ) -> tuple[Tensor, Tensor]:
        """Attend over [text | video]; names and result as diffusers, which calls this."""
        text_tokens = encoder_hidden_states.shape[1]
        joint_BSC = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query_BSHD, key_BSHD, value_BSHD = (
            project(joint_BSC).unflatten(2, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        qkv = QKV(attn.norm_q(query_BSHD), attn.norm_k(key_BSHD), value_BSHD)
        out_BSC = controlled_attention(self.run, self.control, self.layer, qkv)
        out_BSC = attn.to_out[0](out_BSC)  # [1] is dropout
        return out_BSC[:, text_tokens:], out_BSC[:, :text_tokens]


class TextEncoder(NamedTuple):
    """What makes embeddings of a prompt."""

    tokenizer: PromptTokenizer
    encoder: T5EncoderModel


class CogVideoXModel:
    """A VideoModel. The text encoder is loaded when it is first needed: frame videos need none."""

    def __init__(
        self,
        facts: ModelFacts,
        *,
        transformer: CogVideoXTransformer3DModel,
        vae: AutoencoderKLCogVideoX,
        load_text_encoder: Callable[[], TextEncoder],
        scheduler_config: dict[str, object],
        group: SequenceGroup = ALONE,
    ) -> None:
        self.facts = facts
        self.group = group
        self.transformer = transformer
        self.device: torch.device = transformer.device
        self.dtype: torch.dtype = transformer.dtype
        self._vae = vae
        self._load_text_encoder = load_text_encoder
        self._text_encoder: TextEncoder | None = None
        self._scheduler_config = scheduler_config
        self._rotary: dict[tuple[int, int, int], Rotary] = {}
        shard_tokens(transformer.transformer_blocks[0], transformer.norm_final, group)

    def layout(self, video: VideoConfig) -> TokenLayout:
        """Return where text and video tokens stand. Raises ConfigError for an illegal size."""
        frames, height, width = self._grid(video)
        return TokenLayout(
            text_tokens=self.facts.text_tokens,
            latent_frames=frames,
            grid_height=height,
            grid_width=width,
        )

    def rotary(self, video: VideoConfig) -> Rotary:
        """Return the position table of the video tokens; `Rotary.none()` for CogVideoX-2b."""
        return self._rotary_of(self._grid(video))

    def encode_prompts(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return embeddings [P, T, C]. A text that occurs twice is encoded once.

        One prompt at a time: a batch would change the last bits, and with them the video. Padding
        is not masked, as CogVideoX was trained.
        """
        if self._text_encoder is None:
            self._text_encoder = self._load_text_encoder()
        tokenizer, encoder = self._text_encoder
        embeds: dict[str, Tensor] = {}
        for prompt in prompts:
            if prompt.text not in embeds:
                ids = torch.tensor([tokenizer.tokenize(prompt).ids], device=self.device)
                with torch.no_grad():
                    embeds[prompt.text] = encoder(ids)[0].to(self.dtype)
        return torch.cat([embeds[prompt.text] for prompt in prompts])

    def free_text_encoder(self) -> None:
        """Drop the text encoder's weights; the next `encode_prompts` loads them again."""
        self._text_encoder = None

    def initial_noise(self, seed: int, video: VideoConfig) -> Tensor:
        """Return latents [1, F, C, height, width], drawn on the CPU in the model's dtype."""
        frames, height, width = self._grid(video)
        patch = self.facts.patch_size
        shape = (1, frames, self.facts.latent_channels, height * patch, width * patch)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=self.dtype).to(self.device)

    def scheduler(self, name: str) -> Scheduler:
        """Return a fresh scheduler, "ddim" or "dpm", with the noise schedule of the weights."""
        scheduler: Scheduler = SCHEDULERS[name].from_config(self._scheduler_config)
        return scheduler

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Run the transformer once, on latents [B, F, C, height, width] of one timestep.

        In fp32, in which the stock pipeline guides.
        """
        _, frames, _, height, width = latents.shape
        patch = self.facts.patch_size
        rotary = self._rotary_of((frames, height // patch, width // patch))
        prediction: Tensor = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=prompt_embeds,
            timestep=timestep.expand(len(latents)),
            image_rotary_emb=None if rotary.is_none else (rotary.cos_ND, rotary.sin_ND),
            return_dict=False,
        )[0]
        return prediction.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return frames [frames, height, width, 3] of latents [1, F, C, height, width]."""
        _, _, _, height, width = latents.shape
        ratio = self.facts.spatial_ratio
        if height * width * ratio**2 >= TILED_FROM_PIXELS:
            self._vae.enable_tiling(TILE_HEIGHT, TILE_WIDTH)
        else:
            self._vae.disable_tiling()
        scaled_BCFHW = 1 / self._vae.config.scaling_factor * latents.transpose(1, 2)
        video_CFHW = self._vae.decode(scaled_BCFHW).sample[0]
        unit_CFHW = (video_CFHW * 0.5 + 0.5).clamp(0, 1).float()
        bytes_FHWC = (unit_CFHW * 255).round().to(torch.uint8).permute(1, 2, 3, 0)
        frames: NDArray[np.uint8] = bytes_FHWC.contiguous().cpu().numpy()
        return frames

    def controlled_processors(
        self, run: RunContext, control: AttentionControl
    ) -> dict[str, CogVideoXControlledProcessor]:
        """Return one processor per layer, by its path in the transformer."""
        return {
            f"transformer_blocks.{layer}.attn1.processor": CogVideoXControlledProcessor(
                layer, run, control
            )
            for layer in range(self.facts.num_layers)
        }

    def _grid(self, video: VideoConfig) -> tuple[int, int, int]:
        # resolve_config left no None.
        assert video.pixel_frames is not None
        assert video.height is not None
        assert video.width is not None
        return self.facts.grid(video.pixel_frames, video.height, video.width)

    def _rotary_of(self, grid: tuple[int, int, int]) -> Rotary:
        if not self.facts.has_rope:
            return Rotary.none()
        if grid not in self._rotary:
            frames, height, width = grid
            config = self.transformer.config
            crop = get_resize_crop_region_for_grid(
                (height, width),
                config.sample_width // config.patch_size,
                config.sample_height // config.patch_size,
            )
            cos_ND, sin_ND = get_3d_rotary_pos_embed(
                embed_dim=config.attention_head_dim,
                crops_coords=crop,
                grid_size=(height, width),
                temporal_size=frames,
                device=self.device,
            )
            self._rotary[grid] = Rotary(cos_ND, sin_ND)
        return self._rotary[grid]


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Keep the bars of both libraries off stderr: progress there is the command line's to show."""
    noisy = [
        log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()
    ]
    for log in noisy:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in noisy:
            log.enable_progress_bar()


def load_cogvideox(config: ModelConfig, facts: ModelFacts, group: SequenceGroup) -> CogVideoXModel:
    """Load CogVideoX from a folder or the Hub: safetensors weights only, no code from there.

    Raises:
        ConfigError: a folder, file or Hub id is missing or damaged; the device does not exist.
        ModelSupportError: a part of the model is of another class than CogVideoX's.
    """
    is_local = config.id == STORYBOOK_ID or Path(config.id).is_dir()
    # Of a Hub model, facts.folder holds the json files only.
    source = str(facts.folder) if is_local else config.id
    revision = None if is_local else config.revision
    device, dtype = choose_device(config), choose_dtype(config, facts)
    _check_classes(
        load_component(
            lambda: CogVideoXPipeline.load_config(source, revision=revision),
            config=config,
            name="model_index.json",
        ),
        config,
    )

    def load(component: type[Component], name: str) -> Component:
        with _no_loading_bars():
            model, info = load_component(
                lambda: component.from_pretrained(
                    source,
                    subfolder=name,
                    revision=revision,
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                ),
                config=config,
                name=name,
            )
        if info["missing_keys"]:  # both libraries would fill these with random numbers
            raise ConfigError(
                f"model.id {config.id!r}: the weights of its {name} lack "
                f"{len(info['missing_keys'])} tensors ({min(info['missing_keys'])} is one): they "
                f"do not belong to its config.json; download the model again"
            )
        loaded: Component = model.to(device)
        return loaded

    return CogVideoXModel(
        facts,
        transformer=load(CogVideoXTransformer3DModel, "transformer"),
        vae=load(AutoencoderKLCogVideoX, "vae"),
        load_text_encoder=lambda: TextEncoder(
            PromptTokenizer.load(facts, revision=revision), load(T5EncoderModel, "text_encoder")
        ),
        scheduler_config=load_component(
            lambda: CogVideoXDDIMScheduler.load_config(
                source, subfolder="scheduler", revision=revision
            ),
            config=config,
            name="scheduler",
        ),
        group=group,
    )


def _check_classes(index: dict[str, object], config: ModelConfig) -> None:
    """Refuse by name what would load, but as another model than it is."""
    wanted = {
        "transformer": (CogVideoXTransformer3DModel,),
        "vae": (AutoencoderKLCogVideoX,),
        "text_encoder": (T5EncoderModel,),
        "scheduler": tuple(SCHEDULERS.values()),
    }
    for name, classes in wanted.items():
        found = index.get(name)
        class_name = found[-1] if isinstance(found, list) else found
        legal = [known.__name__ for known in classes]
        if class_name not in legal:
            raise ModelSupportError(
                f"model.id {config.id!r} has a {class_name} as its {name}: the CogVideoX adapter "
                f"knows {' and '.join(legal)}; choose a model with these"
            )
