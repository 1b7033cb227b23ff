"""Prompt accuracy: does a video show the background, character and action it was asked for?"""

from __future__ import annotations

from collections.abc import Mapping


def prompt_accuracy(asked: Mapping[str, str], seen: Mapping[str, str]) -> dict[str, float]:
    """Return 1.0 or 0.0 for each segment of the prompt; both map a segment to its phrase."""
    return {segment: float(seen[segment] == phrase) for segment, phrase in asked.items()}
