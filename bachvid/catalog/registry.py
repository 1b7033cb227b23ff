"""What a model is, read from the json files of its folder: no torch, no diffusers, no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from bachvid.catalog.cogvideox import _COGVIDEOX_TRANSFORMERS, _cogvideox_facts
from bachvid.catalog.cogvideox_files import (
    CogVideoXTransformerFile,
    CogVideoXVaeFile,
    check_cogvideox,
)
from bachvid.catalog.facts import ModelFacts, Vocabulary
from bachvid.catalog.families import FAMILIES
from bachvid.catalog.files import JsonFile, ModelIndex, TextEncoderFile, download_json, read_json
from bachvid.catalog.profiles import AttentionFacts, DefaultFacts
from bachvid.catalog.wan import _WAN_TRANSFORMERS, _wan_facts
from bachvid.catalog.wan_files import WanTransformerFile, WanVaeFile, check_wan
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.sections import ModelConfig
from bachvid.inputs.strict_yaml import did_you_mean, quote

STORYBOOK_ID = "storybook"
STORYBOOK_FOLDER = Path(__file__).parents[1] / "storybook" / "weights"
EMBEDDED: Mapping[str, Path] = {
    STORYBOOK_ID: STORYBOOK_FOLDER,
    "storybook-wan": Path(__file__).parents[1] / "storybook" / "wan_weights",
}


def load_facts(model: ModelConfig) -> ModelFacts:
    """Return the facts of an embedded model, a folder, or a Hub id.

    The published models need no network; of another Hub id the json files are downloaded.
    Raises ConfigError if `model.id` names nothing, ModelSupportError if not a model that we run.
    """
    if model.id in EMBEDDED:
        return read_facts(EMBEDDED[model.id], name=model.id)
    if model.id in PUBLISHED:
        return PUBLISHED[model.id]
    folder = Path(model.id)
    if folder.is_dir():
        return read_facts(folder, name=folder.resolve().name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model.id):
        guess = did_you_mean(model.id, [*EMBEDDED, *PUBLISHED])
        raise ConfigError(
            f"model.id: is {quote(model.id)}: must be {' or '.join(map(repr, EMBEDDED))}, a folder "
            f"that exists, or a Hub id as 'THUDM/CogVideoX-5b'.{guess}"
        )
    return read_facts(download_json(model), name=model.id)


def read_facts(folder: Path, *, name: str) -> ModelFacts:
    """Read the facts of a diffusers folder. Raises ModelSupportError if we cannot run it."""
    index = read_json(folder / "model_index.json", ModelIndex)
    pipelines = {traits.pipeline: family for family, traits in FAMILIES.items()}
    if index.class_name not in pipelines:
        raise ModelSupportError(
            f"{folder}: is a {index.class_name}: only {' and '.join(pipelines)}, which make videos "
            f"from text, are supported"
        )
    transformer_path = folder / "transformer" / "config.json"
    vae_path = folder / "vae" / "config.json"
    vae: CogVideoXVaeFile | WanVaeFile
    if pipelines[index.class_name] == "cogvideox":
        transformer = read_json(transformer_path, CogVideoXTransformerFile)
        check_cogvideox(transformer, folder)
        vae = read_json(vae_path, CogVideoXVaeFile)
        facts = _cogvideox_facts(transformer, vae, name=name, folder=folder)
    else:
        wan_transformer = read_json(transformer_path, WanTransformerFile)
        vae = read_json(vae_path, WanVaeFile)
        check_wan(index, wan_transformer, vae, folder)
        facts = _wan_facts(wan_transformer, vae, name=name, folder=folder)
    encoder = read_json(folder / "text_encoder" / "config.json", TextEncoderFile)
    if (vae.latent_channels, encoder.d_model) != (facts.latent_channels, facts.text_dim):
        raise ModelSupportError(
            f"{folder}: its parts do not fit: the transformer takes {facts.latent_channels} latent "
            f"and {facts.text_dim} text channels, the VAE gives {vae.latent_channels} and the "
            f"text encoder {encoder.d_model}"
        )
    return _with_own_facts(facts, folder / "storybook.json")


class _StorybookFile(JsonFile):
    text_tokens: int | None = Field(None, ge=1)  # only where no file of diffusers says it
    vocabulary: Vocabulary | None = None
    defaults: DefaultFacts
    attention: AttentionFacts


def _with_own_facts(facts: ModelFacts, path: Path) -> ModelFacts:
    """Return `facts` with what stands in a file of ours, where a folder has one."""
    if not path.exists():
        return facts
    own = read_json(path, _StorybookFile)
    if own.text_tokens is not None and facts.family != "wan":
        raise ModelSupportError(
            f"{path}: text_tokens: is {own.text_tokens}: only a Wan model can choose it; for "
            f"{facts.family} the transformer's max_text_seq_length says it, {facts.text_tokens}"
        )
    return replace(
        facts,
        text_tokens=own.text_tokens or facts.text_tokens,
        defaults=own.defaults,
        attention=own.attention,
        vocabulary=own.vocabulary,
    )


PUBLISHED: Mapping[str, ModelFacts] = {
    f"{owner}/{name}": _cogvideox_facts(
        transformer, CogVideoXVaeFile(), name=f"{owner}/{name}", folder=None, dtype=dtype
    )
    for name, (transformer, dtype) in _COGVIDEOX_TRANSFORMERS.items()
    for owner in ("THUDM", "zai-org")  # both spellings are in use
} | {
    name: _wan_facts(transformer, WanVaeFile(), name=name, folder=None, dtype="bfloat16")
    for name, transformer in _WAN_TRANSFORMERS.items()
}
