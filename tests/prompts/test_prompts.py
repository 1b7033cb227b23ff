"""Prompts: their segments in characters, and in token rows as the stock pipeline makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from json_models import TEXT_TOKENS, write_json_model
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing

from bachvid.catalog.facts import Vocabulary
from bachvid.catalog.registry import load_facts
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.sections import ModelConfig
from bachvid.inputs.words import Range
from bachvid.prompts.compose import (
    Prompt,
    PromptSpan,
    Segment,
    compose_prompt,
    noun_ranges,
    vocabulary_phrase,
)
from bachvid.prompts.tokenizer import PromptTokenizer

VOCABULARY = Vocabulary(
    background=("a desert",), character=("a Green robot",), action=("jumps", "squats")
)
DESERT = compose_prompt("a desert", "a green robot", "jumps")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_json_model(tmp_path / "model", with_vocabulary=True)


def load(folder: Path) -> PromptTokenizer:
    return PromptTokenizer.load(load_facts(ModelConfig(id=str(folder))))


def save_t5_like(folder: Path, pieces: tuple[str, ...]) -> None:
    """Write a tokenizer of T5's kind: pieces of words, each word with the space before it."""
    words = [f"\u2581{word}" for word in ("a", "desert", "green", "jumps")]
    scores = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", ",", *words, *pieces)]
    tokenizer = Tokenizer(Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))


def test_the_parts_of_a_prompt_are_where_the_spans_say() -> None:
    assert DESERT.text == "a desert, a green robot, jumps"
    found = {span.segment: DESERT.text[span.start : span.stop] for span in DESERT.spans}
    assert found == {"background": "a desert", "character": "a green robot", "action": "jumps"}


def test_rows_are_of_their_part_and_separators_of_none(folder: Path) -> None:
    tokens = load(folder).tokenize(DESERT)
    # a desert , a green robot , jumps </s>
    assert tokens.rows == {"background": (0, 1), "character": (3, 4, 5), "action": (7,)}
    assert tokens.num_tokens == 9


def test_rows_are_of_the_words_that_stand_for_a_segment(folder: Path) -> None:
    words: dict[Segment, tuple[Range, ...]] = {
        "background": noun_ranges("a desert", None),
        "character": noun_ranges("a green robot", ["Robot"]),
    }
    prompt = compose_prompt("a desert", "a green robot", "jumps", words=words)
    assert prompt.text == DESERT.text
    assert (prompt.words("background"), prompt.words("character")) == (("desert",), ("robot",))
    assert prompt.words("action") == ()
    assert load(folder).tokenize(prompt).rows == {
        "background": (1,),
        "character": (5,),
        "action": (7,),
    }


def test_words_in_pieces_keep_all_their_pieces(folder: Path) -> None:
    save_t5_like(folder, ("\u2581robo", "t", "t,"))
    prompt = compose_prompt(
        "a desert", "a robot a robot", "jumps", words={"character": ((2, 7), (10, 15))}
    )
    # a desert , a robo t a robo "t," jumps </s>: a piece of two words belongs to none
    assert load(folder).tokenize(prompt).rows["character"] == (4, 5, 7)


@pytest.mark.parametrize(("phrase", "nouns"), [("it is there", None), ("a robot", ["cat"])])
def test_a_part_without_a_noun_is_refused(phrase: str, nouns: list[str] | None) -> None:
    with pytest.raises(ConfigError, match="none of its words names something visible"):
        noun_ranges(phrase, nouns)


def test_ids_are_padded_to_the_length_of_the_model(folder: Path) -> None:
    tokens = load(folder).tokenize(DESERT)
    assert len(tokens.ids) == TEXT_TOKENS
    assert set(tokens.ids[tokens.num_tokens :]) == {0}
    assert tokens.ids[tokens.num_tokens - 1] == 1


def test_ids_are_those_of_transformers(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    stock = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"), pad_token="<pad>"
    )
    for prompt in (DESERT, Prompt("")):
        expected = stock(prompt.text, padding="max_length", max_length=TEXT_TOKENS)["input_ids"]
        assert list(load(folder).tokenize(prompt).ids) == expected


def test_without_tokenizer_json_transformers_reads_the_folder(folder: Path) -> None:
    tokenizer = folder / "tokenizer"
    (tokenizer / "tokenizer.json").unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "a", "desert", "green", "robot"]
    (tokenizer / "vocab.txt").write_text("\n".join(words))
    (tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokens = load(folder).tokenize(DESERT)
    # [CLS] a desert , a green robot , [UNK] [SEP] [PAD] ...
    assert tokens.ids[:10] == (2, 6, 7, 5, 6, 8, 9, 5, 1, 3)
    assert tokens.ids[10:] == (0,) * (TEXT_TOKENS - 10)
    assert tokens.rows == {"background": (1, 2), "character": (4, 5, 6), "action": (8,)}


def test_a_folder_without_any_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ModelSupportError, match="the tokenizer of model cannot be loaded"):
        load(folder)


def test_the_order_of_the_parts_does_not_matter(folder: Path) -> None:
    spans = (PromptSpan("character", 0, 13), PromptSpan("background", 15, 23))
    tokens = load(folder).tokenize(Prompt("a green robot, a desert", spans))
    assert tokens.rows == {"character": (0, 1, 2), "background": (4, 5)}


def test_pieces_that_carry_the_space_before_them_belong_to_their_word(folder: Path) -> None:
    save_t5_like(folder, ("\u2581robot",))
    text = "a green robot a desert jumps"
    spans = (
        PromptSpan("character", 0, 13),
        PromptSpan("background", 14, 22),
        PromptSpan("action", 23, 28),
    )
    tokens = load(folder).tokenize(Prompt(text, spans))
    assert tokens.rows == {"character": (0, 1, 2), "background": (3, 4), "action": (5,)}


def test_a_piece_that_straddles_a_border_belongs_to_no_part(folder: Path) -> None:
    save_t5_like(folder, ("\u2581robo", "t,"))
    tokens = load(folder).tokenize(DESERT)
    # a desert , a green robo "t," jumps </s>
    assert tokens.rows == {"background": (0, 1), "character": (3, 4, 5), "action": (7,)}


def test_a_prompt_that_just_fits_is_taken_and_one_more_word_is_not(folder: Path) -> None:
    tokenizer = load(folder)
    fits = compose_prompt("a desert", "a " * 13 + "robot", "jumps")
    assert tokenizer.tokenize(fits).num_tokens == TEXT_TOKENS
    with pytest.raises(ConfigError) as caught:
        tokenizer.tokenize(compose_prompt("a desert", "a " * 14 + "robot", "jumps"))
    assert str(caught.value) == ("the prompt has 21 tokens: the model reads 20; shorten it by 1")


def test_a_part_without_a_token_is_refused(folder: Path) -> None:
    span = PromptSpan("action", 8, 9)
    with pytest.raises(ConfigError, match="the action ' ' has no token of its own"):
        load(folder).tokenize(Prompt("a desert  jumps", (span,)))


@pytest.mark.parametrize("words", ["a green robot", " A  GREEN robot"])
def test_a_phrase_is_spelled_as_the_vocabulary_does(words: str) -> None:
    assert vocabulary_phrase("character", words, VOCABULARY) == "a Green robot"


@pytest.mark.parametrize("segment", ["background", "action"])
def test_a_phrase_of_another_segment_is_refused(segment: Segment) -> None:
    with pytest.raises(ConfigError, match="this model knows only these"):
        vocabulary_phrase(segment, "a green robot", VOCABULARY)
