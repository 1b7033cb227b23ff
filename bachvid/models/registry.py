"""Which adapter runs which family."""

from __future__ import annotations

from collections.abc import Callable

from bachvid.attention.groups import ALONE, SequenceGroup
from bachvid.catalog.facts import ModelFacts
from bachvid.errors import ModelSupportError
from bachvid.inputs.sections import ModelConfig
from bachvid.models.base import VideoModel


def load_model(config: ModelConfig, facts: ModelFacts, group: SequenceGroup = ALONE) -> VideoModel:
    """Load the weights of the model that `facts` describes, as one rank of `group`.

    Raises:
        ConfigError: a folder, file or Hub id is missing or damaged; the device does not exist.
        ModelSupportError: the model is of a class or kind that bachvid has no adapter for.
    """
    # Here: importing diffusers takes seconds.
    from bachvid.models.cogvideox import load_cogvideox
    from bachvid.models.wan import load_wan

    loaders: dict[str, Callable[[ModelConfig, ModelFacts, SequenceGroup], VideoModel]] = {
        "cogvideox": load_cogvideox,
        "wan": load_wan,
    }
    if facts.family not in loaders:
        raise ModelSupportError(
            f"model.id {config.id!r} is of the family {facts.family!r}: bachvid has adapters for "
            f"{', '.join(sorted(loaders))}; choose a model of one of these"
        )
    return loaders[facts.family](config, facts, group)
