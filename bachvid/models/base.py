"""What the loop and the controls need of a model, and what all families share of it.

Nothing here names a family, a method or Ray. Shapes: B batch, F latent frames, P prompts, T text
tokens, N video tokens, C channels; h and w are a latent's height and width, H and W a frame's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bachvid.attention.context import RunContext
from bachvid.attention.control import AttentionControl
from bachvid.attention.groups import ALONE, SequenceGroup
from bachvid.attention.rotary import Rotary
from bachvid.catalog.facts import ModelFacts
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.sections import ModelConfig, ResolvedSampling, ResolvedVideo
from bachvid.layout.tokens import TokenLayout
from bachvid.models.solvers import Solver
from bachvid.prompts.compose import Prompt
from bachvid.prompts.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

AttentionProcessor = Callable[..., object]
Grid = tuple[int, int, int]
"""Tokens of a video: latent frames, rows, columns."""


class TextEncoder(NamedTuple):
    """The tokenizer and the encoder that turn a prompt into embeddings."""

    tokenizer: PromptTokenizer
    encoder: PreTrainedModel


class VideoModel(ABC):
    """A text-to-video model: text to embeddings, noise to latents, latents to pixels.

    Latents are [1, F, C, h, w], or have these axes in the model's own order. If several ranks of
    `group` share its forwards, attention must be controlled, if only by `AttentionControl`:
    diffusers' own processors would see the tokens of one rank only.

    Each family subclasses it with what differs. `bachvid.models.loading` loads the components.
    """

    first_block: ClassVar[str]
    """The path of the first block in the transformer."""
    behind_blocks: ClassVar[str]
    """The path of the module behind the last block."""

    def __init__(
        self,
        facts: ModelFacts,
        *,
        transformer: ModelMixin,
        vae: ModelMixin,
        load_text_encoder: Callable[[], TextEncoder],
        scheduler_config: Mapping[str, Any],
        device: torch.device,
        group: SequenceGroup = ALONE,
    ) -> None:
        """Take components in evaluation mode; the text encoder is loaded when first needed."""
        self.facts = facts
        self.transformer = transformer
        self.vae = vae
        self.device = device
        self.dtype: torch.dtype = transformer.dtype
        self.group = group
        self._load_text_encoder = load_text_encoder
        self._text_encoder: TextEncoder | None = None
        self._scheduler_config = scheduler_config
        self._rotary: dict[Grid, Rotary] = {}
        first, behind = (
            transformer.get_submodule(path) for path in (self.first_block, self.behind_blocks)
        )
        shard_tokens(first, behind, group)

    def layout(self, video: ResolvedVideo) -> TokenLayout:
        """Return where text and video tokens stand. Raises ConfigError for an illegal size."""
        return self.facts.layout(video)

    def rotary(self, video: ResolvedVideo) -> Rotary:
        """Return the position table of the video tokens; `Rotary.none()` without RoPE."""
        return self._rotary_of(self.facts.layout(video).grid)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return embeddings [P, T, C], each independent of what else is encoded with it.

        Prompts are encoded one at a time: in a batch the last bits would differ, and with them the
        video. A text that occurs twice is encoded once.
        """
        if self._text_encoder is None:
            self._text_encoder = self._load_text_encoder()
        tokenizer, encoder = self._text_encoder
        embeds: dict[str, Tensor] = {}
        for prompt in prompts:
            if prompt.text not in embeds:
                tokens = tokenizer.tokenize(prompt)
                ids_1T = torch.tensor([tokens.ids], device=self.device)
                with torch.no_grad():
                    embeds[prompt.text] = self._embed(encoder, ids_1T, tokens.num_tokens)
        return torch.cat([embeds[prompt.text] for prompt in prompts])

    def free_text_encoder(self) -> None:
        """Drop the text encoder's weights; the next `encode_prompts` loads them again."""
        self._text_encoder = None

    def initial_noise(self, seed: int, video: ResolvedVideo) -> Tensor:
        """Return latents of one video, drawn on the CPU: equal on every device."""
        shape = self._latent_shape(self.facts.layout(video).grid)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=self._latent_dtype).to(self.device)

    @torch.no_grad()
    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        conditioning: Tensor | None = None,
    ) -> Tensor:
        """Run the transformer once, on the branches of all videos that share a forward.

        Returns the prediction for `latents` at one `timestep` (a scalar), in their layout and in
        the dtype in which the stock pipeline applies guidance. `conditioning` is what a video is
        made from besides its prompt.
        Raises ModelSupportError if the family takes no conditioning.
        """
        if conditioning is not None:
            raise ModelSupportError(
                f"{self.facts.name} is of the family {self.facts.family}, which makes videos from "
                f"text alone: give no conditioning"
            )
        return self._predict(latents, timestep.expand(len(latents)), prompt_embeds)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return the pixel frames [frames, H, W, 3] of one video's latents."""
        ratio = self.facts.spatial_ratio
        self._set_tiling(latents.shape[-2] * ratio, latents.shape[-1] * ratio)
        return _to_frames(self.vae.decode(self._unscaled(latents)).sample[0])

    @torch.no_grad()
    def encode(self, frames: NDArray[np.uint8]) -> Tensor:
        """Return the most likely latents of the pixel frames [frames, H, W, 3] of one video.

        They are the mode of the posterior, so nothing is drawn at random; `decode` takes them.
        Raises ConfigError for an illegal size, ModelSupportError if the autoencoder drops frames.
        """
        num_frames, height, width, _ = frames.shape
        shape = self._latent_shape(self.facts.grid(num_frames, height, width))
        self._set_tiling(height, width)
        video_1CFHW = _from_frames(frames)[None].to(self.device, self.vae.dtype)
        latents = self._scaled(self.vae.encode(video_1CFHW).latent_dist.mode())
        if latents.shape != shape:
            raise ModelSupportError(
                f"the autoencoder of {self.facts.name} does not encode all of {num_frames} frames: "
                f"it returns latents of shape {list(latents.shape)}, not {list(shape)}; use "
                f"another number of frames"
            )
        return latents

    @abstractmethod
    def solver(self, sampling: ResolvedSampling, noise: Tensor, noise_seed: int) -> Solver:
        """Return a fresh solver for one run.

        A stochastic one continues the random stream of `noise_seed` after the draws of `noise`.
        """

    @abstractmethod
    def controlled_processors(
        self, context: RunContext, control: AttentionControl
    ) -> Mapping[str, AttentionProcessor]:
        """Return one processor per attention layer, by its path in the transformer."""

    @property
    @abstractmethod
    def _latent_dtype(self) -> torch.dtype:
        """The dtype in which latents are kept from step to step."""

    @abstractmethod
    def _latent_shape(self, grid: Grid) -> tuple[int, ...]:
        """Return the shape of one video's latents."""

    @abstractmethod
    def _rotary_table(self, grid: Grid) -> Rotary:
        """Return the position table of a grid."""

    @abstractmethod
    def _embed(self, encoder: PreTrainedModel, ids_1T: Tensor, num_tokens: int) -> Tensor:
        """Return embeddings [1, T, C] of a prompt with `num_tokens` tokens before its padding."""

    @abstractmethod
    def _predict(self, latents: Tensor, timestep_B: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Run the transformer, as `predict` says."""

    @abstractmethod
    def _unscaled(self, latents: Tensor) -> Tensor:
        """Return latents as the autoencoder decodes them, [B, C, F, h, w] in its dtype."""

    @abstractmethod
    def _scaled(self, encoded_BCFhw: Tensor) -> Tensor:
        """Return latents of what the autoencoder encoded: inverts `_unscaled`."""

    def _rotary_of(self, grid: Grid) -> Rotary:
        if grid not in self._rotary:
            self._rotary[grid] = self._rotary_table(grid)
        return self._rotary[grid]

    def _set_tiling(self, height: int, width: int) -> None:
        """Let the autoencoder work on overlapping tiles, if frames are large."""
        decoder = self.facts.traits.decoder
        if height * width >= decoder.tiled_from:
            self.vae.enable_tiling(*decoder.tile)
        else:
            self.vae.disable_tiling()


@contextmanager
def attention_control(
    model: VideoModel, context: RunContext, control: AttentionControl
) -> Iterator[None]:
    """Route every layer's attention through `control` until the block ends or fails."""
    transformer = model.transformer
    original = transformer.attn_processors
    # set_attn_processor empties the dict that it is given, so each call gets one of its own.
    transformer.set_attn_processor({**original, **model.controlled_processors(context, control)})
    try:
        yield
    finally:
        transformer.set_attn_processor(dict(original))


def shard_tokens(first_block: nn.Module, behind_blocks: nn.Module, group: SequenceGroup) -> None:
    """Let the blocks of a transformer see this rank's chunk of the video tokens only.

    The tokens [B, N, C] that enter `first_block`, as its first argument or as `hidden_states`, are
    padded with zeros and cut into equal chunks in raster order; those that enter `behind_blocks`,
    the module after the last block, are joined again. Permanent: call it once per transformer.
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

    def join(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (group.gather_tokens(args[0], num_tokens), *args[1:])

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


def _to_frames(video_CFHW: Tensor) -> NDArray[np.uint8]:
    """Convert a decoded video, -1 to 1, to pixel frames [frames, H, W, 3]."""
    unit_CFHW = (video_CFHW * 0.5 + 0.5).clamp(0, 1).float()
    bytes_FHWC = (unit_CFHW * 255).round().to(torch.uint8).permute(1, 2, 3, 0)
    frames: NDArray[np.uint8] = bytes_FHWC.contiguous().cpu().numpy()
    return frames


def _from_frames(frames: NDArray[np.uint8]) -> Tensor:
    """Convert pixel frames [frames, H, W, 3] to an autoencoder's input [C, F, H, W], -1 to 1."""
    unit_FHWC = torch.tensor(frames).float() / 255.0  # a copy: frames may be read-only
    return unit_FHWC.permute(3, 0, 1, 2) * 2.0 - 1.0
