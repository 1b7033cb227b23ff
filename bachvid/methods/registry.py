"""The registry of methods; a method is imported when a config names it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bachvid.methods.base import Method

METHODS: dict[str, str] = {
    "bachvid": "bachvid.methods.bachvid:BachVid",
    "none": "bachvid.methods.none:Vanilla",
}
DEFAULT_METHOD = "bachvid"


def method_class(name: str) -> type[Method[Any]]:
    """Return the class of a method in `METHODS`."""
    module, _, cls = METHODS[name].partition(":")
    found: type[Method[Any]] = getattr(import_module(module), cls)
    return found
