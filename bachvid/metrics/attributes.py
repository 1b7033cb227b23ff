"""Attribute agreement: does a frame video show what the identity video showed?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def attribute_agreement(
    attributes: Mapping[str, Sequence[str]], *, identity: int, video: int
) -> dict[str, float]:
    """Return 1.0 or 0.0 for every attribute that the prompt leaves open.

    `attributes` maps a name (hat, stripes, ...) to the judge's word for every video;
    `identity` and `video` are indices into these words.
    """
    return {
        name: float(words[identity] == words[video]) for name, words in sorted(attributes.items())
    }
