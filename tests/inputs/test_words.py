"""Words: which of them name something, and where they stand."""

from __future__ import annotations

import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from bachvid.inputs.words import clean_text, content_words, find_words


def parts(text: str, ranges: tuple[tuple[int, int], ...]) -> list[str]:
    return [text[start:stop] for start, stop in ranges]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a rocky coast with a lighthouse", ["rocky", "coast", "lighthouse"]),
        ("The girl, in (her) yellow dress.", ["girl", "yellow", "dress"]),
        ("a well-kept dog's bed and a 2nd one", ["well-kept", "dog's", "bed", "2nd", "one"]),
        ("a dog\u2019s bed", ["dog\u2019s", "bed"]),
        ("\u96ea\u5c71, \u5973\u5b69", ["\u96ea\u5c71", "\u5973\u5b69"]),
        ("it is there", []),
        ("", []),
    ],
)
def test_function_words_and_punctuation_are_left_out(text: str, words: list[str]) -> None:
    assert parts(text, content_words(text)) == words


def test_a_word_is_found_wherever_it_stands_alone() -> None:
    text = "a cat, a Cat and a catfish in a red car. red car"
    assert find_words(["cat"], text) == ((2, 5), (9, 12))
    assert parts(text, find_words(["red car", "cat"], text)) == ["cat", "Cat", "red car", "red car"]
    assert find_words(["catf", "."], "a catfish") == ()
    assert find_words(["cat", "CAT"], "a cat") == ((2, 5),)


@pytest.mark.parametrize(
    "text", ["a  dog\n", "&lt;b&gt; &amp;amp; &nbsp; x", "caf\u00e9 \u2014 &eacute;", "", "&nbsp;"]
)
def test_text_is_cleaned_as_the_stock_pipeline_cleans_it(text: str) -> None:
    assert clean_text(text) == prompt_clean(text)
