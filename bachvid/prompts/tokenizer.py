"""Which token rows each segment of a prompt takes. No torch.

Tokens are counted exactly as the stock pipeline makes them: the whole prompt at once, special
tokens added, padded to the model's text length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from bachvid.catalog.facts import ModelFacts
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.strict_yaml import quote
from bachvid.inputs.words import Range
from bachvid.prompts.compose import Prompt, Segment


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """Token ids, padded to the model's text length, and the rows that stand for each segment.

    `num_tokens` counts all tokens but padding, including the end token.
    """

    ids: tuple[int, ...]
    rows: Mapping[Segment, tuple[int, ...]]
    num_tokens: int


class _Encoder(Protocol):
    def __call__(self, text: str) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Return ids, character ranges, and 1 for each special token."""


class PromptTokenizer:
    """The tokenizer of one model, with the rows of each segment of a prompt."""

    def __init__(self, encode: _Encoder, *, pad_id: int, text_tokens: int) -> None:
        self._encode = encode
        self._pad_id = pad_id
        self._text_tokens = text_tokens

    @classmethod
    def load(
        cls, facts: ModelFacts, *, revision: str | None = None, download: bool = True
    ) -> PromptTokenizer:
        """Load the tokenizer of a model from its folder or, for a Hub model, from the Hub.

        Without `download`, the files of a Hub model must be on this machine already.
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
        """Tokenize a prompt, and give each segment the tokens of the words that stand for it.

        A token belongs to the segment that holds its last character that is not a space; one that
        straddles a border, or lies in a separator, belongs to none. Raises ConfigError if the
        prompt is longer than the model reads, or if a segment has no token.
        """
        ids, ranges, special = self._encode(prompt.text)
        excess = len(ids) - self._text_tokens
        if excess > 0:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens: the model reads {self._text_tokens}; "
                f"shorten it by {excess}"
            )
        rows: dict[Segment, tuple[int, ...]] = {}
        for span in prompt.spans:
            whole = (span.start, span.stop)
            rows[span.segment] = tuple(
                row
                for row, (token, is_special) in enumerate(zip(ranges, special, strict=True))
                if not is_special
                and any(_lies_in(prompt.text, token, words) for words in span.words or [whole])
            )
            if not rows[span.segment]:
                words = prompt.text[span.start : span.stop]
                raise ConfigError(
                    f"the {span.segment} {quote(words)} has no token of its own; reword it"
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
        raise ModelSupportError(f"{folder}: its pad token, {quote(pad)}, is not in tokenizer.json")

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
