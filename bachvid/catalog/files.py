"""Reads the json files of a diffusers folder. No torch, no diffusers.

Keys that a file leaves out have the default of the diffusers class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.sections import ModelConfig
from bachvid.inputs.strict_yaml import quote, read_text, validate

FileT = TypeVar("FileT", bound="JsonFile")

Component = Literal["transformer", "vae", "text_encoder"]
"""A component with weights, by the name of its folder."""


class JsonFile(BaseModel):
    """A json file of which we read some keys."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ModelIndex(JsonFile):
    """`model_index.json`."""

    class_name: str = Field(alias="_class_name")


class TextEncoderFile(JsonFile):
    """The config of a T5EncoderModel or UMT5EncoderModel."""

    d_model: int = Field(ge=1)


def read_json(path: Path, model: type[FileT]) -> FileT:
    """Read a file of a model folder. Raises ModelSupportError if it does not fit `model`."""
    try:
        return validate(model, json.loads(read_text(path)), source=lambda _: str(path))
    except ConfigError as error:
        raise ModelSupportError(f"not a diffusers folder that can be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelSupportError(f"{path}: not JSON: {error}") from None


def check_channels(folder: Path, *, latent: tuple[int, int], text: tuple[int, int]) -> None:
    """Check that a transformer takes as many channels as the other components give it.

    Raises ModelSupportError.
    """
    if latent[0] != latent[1] or text[0] != text[1]:
        raise ModelSupportError(
            f"{folder}: its components do not fit: the transformer takes {latent[0]} latent and "
            f"{text[0]} text channels, the VAE gives {latent[1]} and the text encoder {text[1]}"
        )


@dataclass(frozen=True, slots=True)
class ComponentSize:
    """The number of weights of a component, and how many of them have one of its fp32 words."""

    values: int
    fp32_values: int = 0

    def nbytes(self, width: int, *, keeps_fp32: bool) -> int:
        """Return the bytes of the component, loaded with `width` bytes for a value."""
        return self.values * width + (self.fp32_values * (4 - width) if keeps_fp32 else 0)


def read_component_sizes(
    folder: Path, fp32_words: Mapping[Component, frozenset[str]]
) -> dict[Component, ComponentSize] | None:
    """Count the weights of each component from the headers of its safetensors files.

    A tensor counts as fp32 if its dotted name contains one of the words of its component.
    Returns None if a component has no such file. Raises ModelSupportError for a damaged one.
    """
    sizes: dict[Component, ComponentSize] = {}
    for component, words in fp32_words.items():
        tensors: dict[str, int] = {}  # by name: variants of a file have the same names
        for path in sorted((folder / component).glob("*.safetensors")):
            tensors |= _tensor_sizes(path)
        if not tensors:
            return None
        fp32 = sum(n for name, n in tensors.items() if words & set(name.split(".")))
        sizes[component] = ComponentSize(sum(tensors.values()), fp32)
    return sizes


def _tensor_sizes(path: Path) -> dict[str, int]:
    """Return the number of values of each tensor; a JSON header, after its length, comes first."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        header.pop("__metadata__", None)
        return {name: math.prod(tensor["shape"]) for name, tensor in header.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ModelSupportError(
            f"{path}: not a safetensors file ({type(error).__name__}): download the model again"
        ) from None


def download_json(model: ModelConfig) -> Path:
    """Fetch the json files and the tokenizer of a Hub id. Raises ConfigError if that fails."""
    from huggingface_hub import snapshot_download  # half a second that nobody else should pay

    patterns = ["*.json", "tokenizer/*"]
    try:
        snapshot = snapshot_download(model.id, revision=model.revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:  # every error of the Hub's client is one of these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.id: is {quote(model.id)}: neither a folder here nor to be had from the Hub "
            f"({reason})"
        ) from None
    return Path(snapshot)
