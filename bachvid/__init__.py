"""bachvid: stories as videos, with one background and one character in every action.

The public names are loaded when they are first used: importing bachvid imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bachvid.driver.renderer import StoryRenderer
    from bachvid.errors import BachvidError
    from bachvid.inputs.story import Action, Scene, Story
    from bachvid.planning.config import RenderConfig

__all__ = [
    "Action",
    "BachvidError",
    "RenderConfig",
    "Scene",
    "Story",
    "StoryRenderer",
    "__version__",
]

__version__ = "0.1.0"

_HOMES = {
    "Action": "bachvid.inputs.story",
    "BachvidError": "bachvid.errors",
    "RenderConfig": "bachvid.planning.config",
    "Scene": "bachvid.inputs.story",
    "Story": "bachvid.inputs.story",
    "StoryRenderer": "bachvid.driver.renderer",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'bachvid' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
