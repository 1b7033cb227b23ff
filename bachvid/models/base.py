"""What the loop and the controls need of a model, and how a model is loaded.

One adapter file per family gives it. Nothing here names a diffusers class, a method or Ray.
Shapes: B batch, F latent frames, P prompts, T text tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from bachvid.attention.context import RunContext
from bachvid.attention.control import AttentionControl
from bachvid.attention.groups import SequenceGroup
from bachvid.attention.rotary import Rotary
from bachvid.catalog.facts import ModelFacts
from bachvid.errors import ConfigError
from bachvid.inputs.sections import ModelConfig, VideoConfig
from bachvid.layout.tokens import TokenLayout
from bachvid.prompts.compose import Prompt

Component = TypeVar("Component")
AttentionProcessor = Callable[..., object]


class Transformer(Protocol):
    """The part of diffusers' AttentionMixin through which processors are changed."""

    @property
    def attn_processors(self) -> dict[str, AttentionProcessor]:
        """Return a new dict of all processors, by path."""

    def set_attn_processor(self, processor: dict[str, AttentionProcessor]) -> None:
        """Install one processor per path, popping each from `processor`."""


class Scheduler(Protocol):
    """The part of a diffusers scheduler that is the same for all of them."""

    timesteps: Tensor
    step: Callable[..., tuple[Tensor, ...]]  # arguments differ per class

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        """Fill `timesteps`, from noise to video."""


class VideoModel(Protocol):
    """A text-to-video model: text to embeddings, noise to latents, latents to pixels.

    The ranks of `group` share its forwards, and attention must then be controlled, if only by
    `AttentionControl`: diffusers' own processors would see one rank's tokens.
    """

    facts: ModelFacts
    device: torch.device
    dtype: torch.dtype
    group: SequenceGroup

    @property
    def transformer(self) -> Transformer:
        """Return the denoiser, in evaluation mode."""

    @property
    def vae(self) -> nn.Module:
        """Return the autoencoder, in evaluation mode."""

    def layout(self, video: VideoConfig) -> TokenLayout:
        """Return where text and video tokens stand. Raises ConfigError for an illegal size."""

    def rotary(self, video: VideoConfig) -> Rotary:
        """Return the position table of the video tokens; `Rotary.none()` without RoPE."""

    def encode_prompts(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return embeddings [P, T, C], each the same whatever else is encoded with it."""

    def free_text_encoder(self) -> None:
        """Drop the text encoder's weights; the next `encode_prompts` loads them again."""

    def initial_noise(self, seed: int, video: VideoConfig) -> Tensor:
        """Return latents of one video, drawn on the CPU: equal on every device.

        [1, F, C, height, width], or the axes in the model's own order.
        """

    def scheduler(self, name: str) -> Scheduler:
        """Return a fresh scheduler, one of `facts.schedulers`, without a trace of another run."""

    def predict(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Run the transformer once, on the branches of all videos that share a forward.

        The dtype of the result is that in which the stock pipeline guides.
        """

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return pixel frames [frames, height, width, 3] of one video's latents."""

    def controlled_processors(
        self, run: RunContext, control: AttentionControl
    ) -> Mapping[str, AttentionProcessor]:
        """Return one processor per attention layer, by its path in the transformer."""


@contextmanager
def attention_control(
    model: VideoModel, run: RunContext, control: AttentionControl
) -> Iterator[None]:
    """Route every layer's attention through `control` until the block ends or fails."""
    transformer = model.transformer
    original = transformer.attn_processors
    # set_attn_processor empties the dict that it is given, so each call gets one of its own.
    transformer.set_attn_processor({**original, **model.controlled_processors(run, control)})
    try:
        yield
    finally:
        transformer.set_attn_processor(dict(original))


def shard_tokens(first_block: nn.Module, behind_blocks: nn.Module, group: SequenceGroup) -> None:
    """Let the blocks of a transformer see this rank's chunk of the video tokens only.

    The tokens [B, N, C] that enter `first_block`, as its first argument or as `hidden_states`, are
    padded with zeros and cut into equal raster chunks; those that enter `behind_blocks`, the
    module behind the last block, are put together again. For good: call it once per transformer.
    """
    if group.size == 1:
        return
    num_tokens = 0

    def split(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal num_tokens
        x_BNC: Tensor = args[0] if args else kwargs["hidden_states"]
        num_tokens = x_BNC.shape[1]
        padded_BNC = F.pad(x_BNC, (0, 0, 0, -num_tokens % group.size))
        own_BNC = padded_BNC.chunk(group.size, dim=1)[group.rank]
        if args:
            return (own_BNC, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": own_BNC}

    def join(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return group.gather_tokens(args[0])[:, :num_tokens]

    first_block.register_forward_pre_hook(split, with_kwargs=True)
    behind_blocks.register_forward_pre_hook(join)


def choose_device(config: ModelConfig) -> torch.device:
    """Return the device of `model.device`; "auto" is the GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError(
            "model.device is 'cuda', but torch sees no GPU here: use 'auto' or 'cpu', or install "
            "a CUDA build of torch"
        )
    return torch.device("cuda" if has_gpu and config.device != "cpu" else "cpu")


def choose_dtype(config: ModelConfig, facts: ModelFacts) -> torch.dtype:
    """Return the dtype of `model.dtype`, or the one that the model's weights are meant for."""
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return dtypes[config.dtype or facts.defaults.dtype]


def load_component(load: Callable[[], Component], *, config: ModelConfig, name: str) -> Component:
    """Return `load()`; what a library says about bad files becomes a ConfigError.

    Raises ConfigError for files that are absent, damaged or of other sizes than their config.
    """
    try:
        return load()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"model.id {config.id!r}: cannot load its {name}: {reason}; model.id must be a folder "
            f"in diffusers format with safetensors weights, or the id of such a repository on the "
            f"Hub (check that the download is complete; for the Hub, model.revision and that it "
            f"can be reached)"
        ) from error
