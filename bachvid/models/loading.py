"""Loads the components of an adapter from a diffusers folder: safetensors only, no remote code.

Shared by all families; nothing here names one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from bachvid.attention.groups import SequenceGroup
from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.files import Component
from bachvid.catalog.registry import EMBEDDED
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.sections import ModelConfig
from bachvid.models.base import TextEncoder, VideoModel, choose_device
from bachvid.prompts.tokenizer import PromptTokenizer
from bachvid.units import join_words

AdapterT = TypeVar("AdapterT", bound=VideoModel)
LoadedT = TypeVar("LoadedT")
Classes = Mapping[Component | Literal["scheduler"], Sequence[Any]]
"""The library's classes that a component may be of; it is loaded as the first of them."""


def load_adapter(
    adapter: type[AdapterT],
    config: ModelConfig,
    facts: ModelFacts,
    group: SequenceGroup,
    *,
    classes: Classes,
) -> AdapterT:
    """Load a model from a folder or the Hub: safetensors weights only, no code from there.

    Raises:
        ConfigError: a folder, file or Hub id is missing or damaged; the device does not exist.
        ModelSupportError: a component of the model is of another class than those in `classes`.
    """
    loader = ComponentLoader(config, facts, classes=classes)
    transformer = loader.load("transformer")
    vae = loader.load("vae")
    loader.place(transformer, vae)
    return adapter(
        facts,
        transformer=transformer,
        vae=vae,
        load_text_encoder=loader.load_text_encoder,
        scheduler_config=loader.scheduler_config(),
        device=loader.device,
        group=group,
    )


class ComponentLoader:
    """Loads the components of one model: from a folder, or from the Hub.

    Raises ModelSupportError for a component whose class is not in `classes`: it would load, but as
    another model.
    """

    def __init__(self, config: ModelConfig, facts: ModelFacts, *, classes: Classes) -> None:
        is_local = config.id in EMBEDDED or Path(config.id).is_dir()
        # Of a Hub model, facts.folder holds the json files only.
        self._source = str(facts.folder) if is_local else config.id
        self._revision = None if is_local else config.revision
        self._config, self._facts, self._classes = config, facts, classes
        self.device = choose_device(config)
        self._hooks: list[UserCpuOffloadHook] = []
        index = self._load_file(
            lambda: DiffusionPipeline.load_config(self._source, revision=self._revision),
            name="model_index.json",
        )
        for name, legal in classes.items():
            self._check_class(name, index.get(name), [known.__name__ for known in legal])

    def load(self, name: Component) -> Any:  # of one of the libraries, which are untyped
        """Load one component into host memory, in the dtypes that its family says.

        Raises ConfigError if files are missing, damaged or do not belong together.
        """
        chosen = self._config.dtype or self._facts.defaults.dtype
        dtype = self._facts.traits.components[name].dtype(chosen)
        with _no_loading_bars():
            model, info = self._load_file(
                lambda: self._classes[name][0].from_pretrained(
                    self._source,
                    subfolder=name,
                    revision=self._revision,
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                ),
                name=name,
            )
        if info["missing_keys"]:  # both libraries would fill these with random numbers
            raise ConfigError(
                f"model.id {self._config.id!r}: the weights of its {name} lack "
                f"{len(info['missing_keys'])} tensors ({min(info['missing_keys'])} is one): they "
                f"do not belong to its config.json; download the model again"
            )
        return model

    def place(self, transformer: torch.nn.Module, vae: torch.nn.Module) -> None:
        """Move both to the device or, with model.offload, let them take turns there.

        Accelerate's hooks move a component in when it is called, after the other has left.
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

    def load_text_encoder(self) -> TextEncoder:
        """Load tokenizer and text encoder. Raises ConfigError or ModelSupportError."""
        for hook in self._hooks:  # whoever loads an encoder frees it; until then it is alone
            hook.offload()
        tokenizer = PromptTokenizer.load(self._facts, revision=self._revision)
        return TextEncoder(tokenizer, self.load("text_encoder").to(self.device))

    def scheduler_config(self) -> dict[str, Any]:
        """Load the noise schedule of the weights. Raises ConfigError if there is none."""
        return self._load_file(
            lambda: self._classes["scheduler"][0].load_config(
                self._source, subfolder="scheduler", revision=self._revision
            ),
            name="scheduler",
        )

    def _load_file(self, load: Callable[[], LoadedT], *, name: str) -> LoadedT:
        """Return `load()`, turning what a library raises for bad files into a ConfigError.

        Raises ConfigError for files that are absent, damaged or of other sizes than their config.
        """
        try:
            return load()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"model.id {self._config.id!r}: cannot load its {name}: {reason}; model.id must "
                f"be a folder in diffusers format with safetensors weights, or the id of such a "
                f"repository on the Hub (check that the download is complete; for the Hub, "
                f"model.revision and that it can be reached)"
            ) from error

    def _check_class(self, name: str, found: object, legal: Sequence[str]) -> None:
        class_name = found[-1] if isinstance(found, list) else found
        if class_name not in legal:
            raise ModelSupportError(
                f"model.id {self._config.id!r} has a {class_name} as its {name}: the adapter for "
                f"{self._facts.family} knows {join_words(legal, 'and')}; choose a model with these"
            )


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Silence the progress bars of both libraries: on stderr the command line shows its own."""
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
