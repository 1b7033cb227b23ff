"""Prompt accuracy: does a video show the background, character and action it was asked for?"""

from __future__ import annotations

from collections.abc import Mapping


def prompt_accuracy(asked: Mapping[str, str], seen: Mapping[str, str]) -> dict[str, float]:
    """Return 1.0 or 0.0 for each part of the prompt; both map a part to its phrase."""
    return {part: float(seen[part] == phrase) for part, phrase in asked.items()}
