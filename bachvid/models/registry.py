"""The registry of adapters: one is imported when a model of its family is loaded."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from bachvid.catalog.facts import ModelFacts
from bachvid.errors import ModelSupportError
from bachvid.inputs.sections import ModelConfig

if TYPE_CHECKING:
    from bachvid.attention.groups import SequenceGroup
    from bachvid.models.base import VideoModel

ADAPTERS: dict[str, str] = {
    "cogvideox": "bachvid.models.cogvideox:load_cogvideox",
    "wan": "bachvid.models.wan:load_wan",
}
"""What loads a model of a family, as module:function. Its facts: `bachvid.catalog.registry`."""


def load_model(config: ModelConfig, facts: ModelFacts, group: SequenceGroup) -> VideoModel:
    """Load the weights of the model that `facts` describes, as one rank of `group`.

    Raises:
        ConfigError: a folder, file or Hub id is missing or damaged; the device does not exist.
        ModelSupportError: the model is of a class or kind that bachvid has no adapter for.
    """
    if facts.family not in ADAPTERS:
        raise ModelSupportError(
            f"model.id {config.id!r} is of the family {facts.family!r}: bachvid has adapters for "
            f"{', '.join(sorted(ADAPTERS))}; choose a model of one of these"
        )
    module, _, name = ADAPTERS[facts.family].partition(":")
    model: VideoModel = getattr(import_module(module), name)(config, facts, group)
    return model
