"""Prompts from their parts, and which token rows each part takes. No torch.

Tokens are counted exactly as the stock pipeline makes them: the whole prompt at once, special
tokens added, padded to the model's text length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tokenizers import Tokenizer

from bachvid.catalog.registry import ModelFacts, Vocabulary
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.strict_yaml import did_you_mean, shown
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
        """Give the words that stand for a part in masks; none: all of it."""
        return tuple(
            self.text[start:stop]
            for span in self.spans
            if span.part == part
            for start, stop in span.words
        )


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """Token ids, padded to the model's text length, and the rows that stand for each part.

    `num_tokens` counts what is not padding, the end token too.
    """

    ids: tuple[int, ...]
    rows: Mapping[PromptPart, tuple[int, ...]]
    num_tokens: int


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
    """Give where the nouns of a phrase stand; without any given, all but function words.

    Raises ConfigError if there are none.
    Source: BachVid, review version, App. B: whole phrases fail on Wan, since "the" or "with" get
    much attention. There a language model names the nouns.
    """
    ranges = find_words(nouns, phrase) if nouns else content_words(phrase)
    if not ranges:
        raise ConfigError(
            f"is {shown(phrase)}: none of its words names what is to be seen; use others, list "
            f"them under the scene's nouns, or set method.mask_words=all"
        )
    return ranges


def vocabulary_phrase(part: PromptPart, words: str, vocabulary: Vocabulary) -> str:
    """Give `words` as the vocabulary spells them. Raises ConfigError if it does not have them."""
    phrases: tuple[str, ...] = getattr(vocabulary, part)
    folded = " ".join(words.split()).lower()
    for phrase in phrases:
        if phrase.lower() == folded:
            return phrase
    known = ", ".join(f'"{phrase}"' for phrase in phrases)
    raise ConfigError(
        f"is {shown(words)}: this model knows only these: {known}.{did_you_mean(folded, phrases)}"
    )


class _Encoder(Protocol):
    def __call__(self, text: str) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Give ids, character ranges, and 1 for each special token."""


class PromptTokenizer:
    """The tokenizer of one model, with the rows of each part of a prompt."""

    def __init__(self, encode: _Encoder, *, pad_id: int, text_tokens: int) -> None:
        self._encode = encode
        self._pad_id = pad_id
        self._text_tokens = text_tokens

    @classmethod
    def load(
        cls, facts: ModelFacts, *, revision: str | None = None, download: bool = True
    ) -> PromptTokenizer:
        """Load the tokenizer of `facts`: from its folder, or for a Hub model from the Hub.

        Without `download`, a Hub model's must be on this machine already.
        Raises ModelSupportError if there is none.
        """
        folder = facts.folder / "tokenizer" if facts.folder else None
        if folder and (folder / "tokenizer.json").exists():
            encode, pad_id = _load_tokenizer_json(folder)
        else:
            if not folder and not download:
                _check_cached(facts.name, revision)
            encode, pad_id = _load_with_transformers(facts, folder, revision)
        return cls(encode, pad_id=pad_id, text_tokens=facts.text_tokens)

    def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """Tokenize a prompt, and give each part the tokens of the words that stand for it.

        A token belongs to the part that holds its last character that is not a space; one that
        straddles a border, or lies in a separator, belongs to none. Raises ConfigError if the
        prompt is longer than the model reads, or if a part has no token.
        """
        ids, ranges, special = self._encode(prompt.text)
        excess = len(ids) - self._text_tokens
        if excess > 0:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens: the model reads {self._text_tokens}; "
                f"shorten it by {excess}"
            )
        rows: dict[PromptPart, tuple[int, ...]] = {}
        for span in prompt.spans:
            whole = (span.start, span.stop)
            rows[span.part] = tuple(
                row
                for row, (token, is_special) in enumerate(zip(ranges, special, strict=True))
                if not is_special
                and any(_lies_in(prompt.text, token, words) for words in span.words or [whole])
            )
            if not rows[span.part]:
                words = prompt.text[span.start : span.stop]
                raise ConfigError(
                    f"the {span.part} {shown(words)} has no token of its own; use other words"
                )
        padding = (self._pad_id,) * -excess
        return TokenizedPrompt((*ids, *padding), rows, len(ids))


def _lies_in(text: str, token: Range, words: Range) -> bool:
    start, stop = token
    word = text[start:stop]
    # Tokenizers of the Metaspace kind count the space before a word to the word.
    start += len(word) - len(word.lstrip())
    stop -= len(word) - len(word.rstrip())
    return words[0] <= start < stop <= words[1]


def _load_tokenizer_json(folder: Path) -> tuple[_Encoder, int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    pad = settings.get("pad_token")
    pad_id = tokenizer.token_to_id(pad["content"] if isinstance(pad, dict) else str(pad))
    if pad_id is None:
        raise ModelSupportError(f"{folder}: its pad token, {shown(pad)}, is not in tokenizer.json")

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        encoding = tokenizer.encode(text)
        return encoding.ids, encoding.offsets, encoding.special_tokens_mask

    return encode, pad_id


def _check_cached(hub_id: str, revision: str | None) -> None:
    from huggingface_hub import try_to_load_from_cache  # for Hub models only: a tenth of a second

    found = try_to_load_from_cache(hub_id, "tokenizer/tokenizer_config.json", revision=revision)
    if not isinstance(found, str):
        raise ModelSupportError(f"the tokenizer of {hub_id} is not on this machine yet")


def _load_with_transformers(
    facts: ModelFacts, folder: Path | None, revision: str | None
) -> tuple[_Encoder, int]:
    from transformers import AutoTokenizer  # seconds, and torch: only where there is no other way
    from transformers.utils import logging

    # It would warn of every prompt longer than its own limit; tokenize() checks the model's.
    logging.set_verbosity_error()
    try:
        if folder:
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                facts.name, subfolder="tokenizer", revision=revision
            )
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelSupportError(
            f"the tokenizer of {facts.name} cannot be loaded: {reason} (a spiece.model needs "
            f"the package sentencepiece)"
        ) from None

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        return encoding["input_ids"], encoding["offset_mapping"], encoding["special_tokens_mask"]

    return encode, tokenizer.pad_token_id
