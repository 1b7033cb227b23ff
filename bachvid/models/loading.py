"""How an adapter gets its parts from a diffusers folder: safetensors only, no code from there.

What is the same for all families stands here; nothing here names one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.registry import EMBEDDED
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.sections import ModelConfig
from bachvid.models.base import choose_device, choose_dtype, load_component
from bachvid.prompts.compose import Prompt
from bachvid.prompts.tokenizer import PromptTokenizer

Component = TypeVar("Component", bound=torch.nn.Module)


class TextEncoder(NamedTuple):
    """What makes embeddings of a prompt."""

    tokenizer: PromptTokenizer
    encoder: PreTrainedModel


class PartLoader:
    """Loads the parts of one model: from a folder, or from the Hub.

    Raises ModelSupportError if a part is of a class that is not among those of its name in
    `classes`: it would load, but as another model than it is.
    """

    def __init__(
        self, config: ModelConfig, facts: ModelFacts, *, classes: Mapping[str, Sequence[type]]
    ) -> None:
        is_local = config.id in EMBEDDED or Path(config.id).is_dir()
        # Of a Hub model, facts.folder holds the json files only.
        self._source = str(facts.folder) if is_local else config.id
        self._revision = None if is_local else config.revision
        self._config, self._facts = config, facts
        self.device, self._dtype = choose_device(config), choose_dtype(config, facts)
        self._hooks: list[UserCpuOffloadHook] = []
        index = load_component(
            lambda: DiffusionPipeline.load_config(self._source, revision=self._revision),
            config=config,
            name="model_index.json",
        )
        for name, legal in classes.items():
            self._check_class(name, index.get(name), [known.__name__ for known in legal])

    def load(
        self, component: type[Component], name: str, *, dtype: torch.dtype | None = None
    ) -> Component:
        """Load one part, in the model's dtype unless `dtype` is another, into host memory.

        Raises ConfigError if files are missing, damaged or do not belong together.
        """
        with _no_loading_bars():
            model, info = load_component(
                lambda: component.from_pretrained(  # type: ignore[attr-defined]
                    self._source,
                    subfolder=name,
                    revision=self._revision,
                    dtype=dtype or self._dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                ),
                config=self._config,
                name=name,
            )
        if info["missing_keys"]:  # both libraries would fill these with random numbers
            raise ConfigError(
                f"model.id {self._config.id!r}: the weights of its {name} lack "
                f"{len(info['missing_keys'])} tensors ({min(info['missing_keys'])} is one): they "
                f"do not belong to its config.json; download the model again"
            )
        loaded: Component = model
        return loaded

    def place(self, transformer: torch.nn.Module, vae: torch.nn.Module) -> None:
        """Move both to the device or, with model.offload, let them take turns there.

        Accelerate's hooks do that: each part moves when it is called, after the other has left.
        """
        if self._config.offload == "none":
            transformer.to(self.device)
            vae.to(self.device)
            return
        # With its index, as parameters have it: else the hooks would move them every time.
        device = torch.empty(0, device=self.device).device
        _, first = cpu_offload_with_hook(transformer, device)
        _, second = cpu_offload_with_hook(vae, device, prev_module_hook=first)
        first.hook.prev_module_hook = second
        self._hooks = [first, second]

    def load_text_encoder(self, encoder: type[PreTrainedModel]) -> TextEncoder:
        """Load tokenizer and text encoder. Raises ConfigError or ModelSupportError."""
        for hook in self._hooks:  # whoever loads an encoder frees it; until then it is alone
            hook.offload()
        tokenizer = PromptTokenizer.load(self._facts, revision=self._revision)
        return TextEncoder(tokenizer, self.load(encoder, "text_encoder").to(self.device))

    def scheduler_config(self, scheduler: type[SchedulerMixin]) -> dict[str, Any]:
        """Load the noise schedule of the weights. Raises ConfigError if there is none."""
        config: dict[str, Any] = load_component(
            lambda: scheduler.load_config(
                self._source, subfolder="scheduler", revision=self._revision
            ),
            config=self._config,
            name="scheduler",
        )
        return config

    def _check_class(self, name: str, found: object, legal: Sequence[str]) -> None:
        class_name = found[-1] if isinstance(found, list) else found
        if class_name not in legal:
            raise ModelSupportError(
                f"model.id {self._config.id!r} has a {class_name} as its {name}: the adapter for "
                f"{self._facts.family} knows {' and '.join(legal)}; choose a model with these"
            )


def encode_each(prompts: Sequence[Prompt], encode: Callable[[Prompt], Tensor]) -> Tensor:
    """Return the embeddings [1, T, C] of all prompts as [P, T, C]; a text that comes twice once.

    One prompt at a time: a batch would change the last bits, and with them the video.
    """
    embeds: dict[str, Tensor] = {}
    for prompt in prompts:
        if prompt.text not in embeds:
            embeds[prompt.text] = encode(prompt)
    return torch.cat([embeds[prompt.text] for prompt in prompts])


def to_frames(video_CFHW: Tensor) -> NDArray[np.uint8]:
    """Return what a VAE decoded, -1 to 1, as pixel frames [frames, height, width, 3]."""
    unit_CFHW = (video_CFHW * 0.5 + 0.5).clamp(0, 1).float()
    bytes_FHWC = (unit_CFHW * 255).round().to(torch.uint8).permute(1, 2, 3, 0)
    frames: NDArray[np.uint8] = bytes_FHWC.contiguous().cpu().numpy()
    return frames


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
