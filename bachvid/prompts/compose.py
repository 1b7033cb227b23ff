"""Prompts from their parts, and which token rows each part takes. No torch.

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

PromptPart = Literal["background", "character", "action"]
PARTS: tuple[PromptPart, ...] = ("background", "character", "action")

_SEPARATOR = ", "


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """The characters [start, stop) that a part takes in the prompt.

    `words` are the ranges of them that stand for the part in masks; none: all of it.
    """

    part: PromptPart
    start: int
    stop: int
    words: tuple[Range, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and where its parts stand. Text outside every span belongs to no part."""

    text: str
    spans: tuple[PromptSpan, ...] = ()

    def words(self, part: PromptPart) -> tuple[str, ...]:
        """Return the words that stand for a part in masks; none: all of it."""
        return tuple(
            self.text[start:stop]
            for span in self.spans
            if span.part == part
            for start, stop in span.words
        )


def compose_prompt(
    background: str,
    character: str,
    action: str,
    *,
    words: Mapping[PromptPart, Sequence[Range]] | None = None,
) -> Prompt:
    """Join the parts as "background, character, action".

    `words`: of each part, the ranges that stand for it in masks, as `noun_ranges` gives them.
    Source: BachVid (arXiv 2510.21696v1), App. C.
    """
    text, spans = "", []
    for part, phrase in zip(PARTS, (background, character, action), strict=True):
        text += _SEPARATOR if text else ""
        first = len(text)
        ranges = tuple((first + i, first + j) for i, j in (words or {}).get(part, ()))
        spans.append(PromptSpan(part, first, first + len(phrase), ranges))
        text += phrase
    return Prompt(text, tuple(spans))


def noun_ranges(phrase: str, nouns: Sequence[str] | None) -> tuple[Range, ...]:
    """Return where the nouns of a phrase stand; without any given, all but function words.

    Raises ConfigError if there are none.
    Source: BachVid, review version, App. B: whole phrases fail on Wan, since "the" or "with" get
    much attention. There a language model names the nouns.
    """
    ranges = find_words(nouns, phrase) if nouns else content_words(phrase)
    if not ranges:
        raise ConfigError(
            f"is {quote(phrase)}: none of its words names what is to be seen; use others, list "
            f"them under the scene's nouns, or set method.mask_words=all"
        )
    return ranges


def vocabulary_phrase(part: PromptPart, words: str, vocabulary: Vocabulary) -> str:
    """Return `words` as the vocabulary spells them. Raises ConfigError if it does not have them."""
    phrases: tuple[str, ...] = getattr(vocabulary, part)
    folded = " ".join(words.split()).lower()
    for phrase in phrases:
        if phrase.lower() == folded:
            return phrase
    known = ", ".join(f'"{phrase}"' for phrase in phrases)
    raise ConfigError(
        f"is {quote(words)}: this model knows only these: {known}.{did_you_mean(folded, phrases)}"
    )
