"""The registry of families, and the facts of a model from its json files. No torch, no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from pydantic import Field

from bachvid.catalog.facts import Family, ModelFacts, Vocabulary
from bachvid.catalog.files import JsonFile, ModelIndex, download_json, read_json
from bachvid.catalog.profiles import AttentionFacts, DefaultFacts
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.sections import ModelConfig
from bachvid.inputs.strict_yaml import did_you_mean, quote
from bachvid.units import join_words

FAMILIES: dict[str, str] = {
    "cogvideox": "bachvid.catalog.cogvideox",
    "wan": "bachvid.catalog.wan",
}
"""The module of each family, which has its `FAMILY`. Its adapter: `bachvid.models.registry`."""

STORYBOOK_ID = "storybook"
STORYBOOK_FOLDER = Path(__file__).parents[1] / "storybook" / "weights"
EMBEDDED: Mapping[str, Path] = {
    STORYBOOK_ID: STORYBOOK_FOLDER,
    "storybook-wan": Path(__file__).parents[1] / "storybook" / "wan_weights",
}


def load_families() -> list[Family]:
    """Import and return all families."""
    return [import_module(module).FAMILY for module in FAMILIES.values()]


def published_models() -> dict[str, ModelFacts]:
    """Return the facts of the published models, by Hub id; they need no network."""
    families = load_families()
    return {hub_id: facts for family in families for hub_id, facts in family.published.items()}


def load_facts(model: ModelConfig) -> ModelFacts:
    """Return the facts of an embedded model, a folder, or a Hub id.

    For a Hub id that is not among the published models, the json files are downloaded.
    Raises ConfigError if `model.id` names nothing, ModelSupportError if bachvid cannot run it.
    """
    if model.id in EMBEDDED:
        return read_facts(EMBEDDED[model.id], name=model.id)
    published = published_models()
    if model.id in published:
        return published[model.id]
    folder = Path(model.id)
    if folder.is_dir():
        return read_facts(folder, name=folder.resolve().name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model.id):
        guess = did_you_mean(model.id, [*EMBEDDED, *published])
        raise ConfigError(
            f"model.id: is {quote(model.id)}: must be {', '.join(map(repr, EMBEDDED))}, a folder "
            f"that exists, or a Hub id as 'THUDM/CogVideoX-5b'.{guess}"
        )
    return read_facts(download_json(model), name=model.id)


def read_facts(folder: Path, *, name: str) -> ModelFacts:
    """Read the facts of a diffusers folder. Raises ModelSupportError if bachvid cannot run it."""
    index = read_json(folder / "model_index.json", ModelIndex)
    families = {family.traits.pipeline: family for family in load_families()}
    if index.class_name not in families:
        raise ModelSupportError(
            f"{folder}: is a {index.class_name}: only {join_words(families, 'and')}, which make "
            f"videos from text, are supported"
        )
    facts = families[index.class_name].read(folder, name)
    return _with_own_facts(facts, folder / "storybook.json")


class _StorybookFile(JsonFile):
    text_tokens: int | None = Field(None, ge=1)  # only where no file of diffusers says it
    vocabulary: Vocabulary | None = None
    defaults: DefaultFacts
    attention: AttentionFacts


def _with_own_facts(facts: ModelFacts, path: Path) -> ModelFacts:
    """Return `facts` with the values of a `storybook.json`, if there is one."""
    if not path.exists():
        return facts
    own = read_json(path, _StorybookFile)
    if own.text_tokens is not None and facts.traits.text_tokens is None:
        raise ModelSupportError(
            f"{path}: text_tokens: is {own.text_tokens}: in the family {facts.family} the config "
            f"of the transformer says it, {facts.text_tokens}; remove the key"
        )
    return replace(
        facts,
        text_tokens=own.text_tokens or facts.text_tokens,
        defaults=own.defaults,
        attention=own.attention,
        vocabulary=own.vocabulary,
    )
