"""Methods: what is done to attention. They know no model, no Ray and no diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from bachvid.inputs.config import MethodConfig
from bachvid.methods.bachvid import BachVid
from bachvid.methods.base import Method, MethodSettings
from bachvid.methods.none import Vanilla

METHODS: dict[Literal["bachvid", "none"], Callable[..., Method]] = {
    "bachvid": BachVid,
    "none": Vanilla,
}


def build_method(config: MethodConfig, *, config_hash: str) -> Method:
    """Return the method that a resolved config names.

    `config_hash` goes into the identity caches, and must be found in those that are read.
    """
    return METHODS[config.name](MethodSettings.from_config(config), config_hash=config_hash)
