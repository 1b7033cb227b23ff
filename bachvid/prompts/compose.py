"""Prompts from their segments, and which token rows each segment takes. No torch.

Tokens are counted exactly as the stock pipeline makes them: the whole prompt at once, special
tokens added, padded to the model's text length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bachvid.catalog.facts import Vocabulary
from bachvid.errors import ConfigError
from bachvid.inputs.strict_yaml import did_you_mean, quote
from bachvid.inputs.words import Range, content_words, find_words

Segment = Literal["background", "character", "action"]
SEGMENTS: tuple[Segment, ...] = ("background", "character", "action")

_SEPARATOR = ", "


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """The characters [start, stop) of a prompt that a segment takes.

    `words` are the ranges among them that stand for the segment in masks; empty means all of it.
    """

    segment: Segment
    start: int
    stop: int
    words: tuple[Range, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and where its segments stand. Text outside every span belongs to no segment."""

    text: str
    spans: tuple[PromptSpan, ...] = ()

    def words(self, segment: Segment) -> tuple[str, ...]:
        """Return the words that stand for a segment in masks; empty means all of it."""
        return tuple(
            self.text[start:stop]
            for span in self.spans
            if span.segment == segment
            for start, stop in span.words
        )


def compose_prompt(
    background: str,
    character: str,
    action: str,
    *,
    words: Mapping[Segment, Sequence[Range]] | None = None,
) -> Prompt:
    """Join the segments as "background, character, action".

    `words`: for each segment, the ranges that stand for it in masks, as `noun_ranges` returns them.
    Source: BachVid (arXiv 2510.21696v1), App. C.
    """
    text, spans = "", []
    for segment, phrase in zip(SEGMENTS, (background, character, action), strict=True):
        text += _SEPARATOR if text else ""
        first = len(text)
        ranges = tuple((first + i, first + j) for i, j in (words or {}).get(segment, ()))
        spans.append(PromptSpan(segment, first, first + len(phrase), ranges))
        text += phrase
    return Prompt(text, tuple(spans))


def noun_ranges(phrase: str, nouns: Sequence[str] | None) -> tuple[Range, ...]:
    """Return where the nouns of a phrase stand; without `nouns`, all words but function words.

    Raises ConfigError if there are none.
    Source: BachVid, review version, App. B: whole phrases fail on Wan, where words like "the"
    and "with" get much attention. In the paper a language model names the nouns.
    """
    ranges = find_words(nouns, phrase) if nouns else content_words(phrase)
    if not ranges:
        raise ConfigError(
            f"is {quote(phrase)}: none of its words names something visible; reword it, list "
            f"them under the scene's nouns, or set method.mask_words=all"
        )
    return ranges


def vocabulary_phrase(segment: Segment, words: str, vocabulary: Vocabulary) -> str:
    """Return `words` as the vocabulary spells them. Raises ConfigError if it does not have them."""
    phrases: tuple[str, ...] = getattr(vocabulary, segment)
    folded = " ".join(words.split()).lower()
    for phrase in phrases:
        if phrase.lower() == folded:
            return phrase
    known = ", ".join(f'"{phrase}"' for phrase in phrases)
    raise ConfigError(
        f"is {quote(words)}: this model knows only these: {known}.{did_you_mean(folded, phrases)}"
    )
