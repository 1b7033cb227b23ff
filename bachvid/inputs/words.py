"""Words of a prompt: how they are cleaned, and which of them name something visible. No torch."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

Range = tuple[int, int]  # characters [start, stop)

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")  # U+2019 is the apostrophe of printers

# Articles, prepositions, conjunctions, pronouns, auxiliaries: words that name nothing.
_FUNCTION_WORDS = frozenset(
    """
    a about above across after against all along am among an and any are around as at be because
    been before behind being below beneath beside between beyond both but by can could did do does
    down during each either every few for from had has have having he her hers here him his how i
    if in inside into is it its like many may me might more most much must my near neither no nor
    not of off on onto or other our out outside over own past per she should since so some such
    than that the their them then there these they this those through to toward towards under
    until up upon us very was we were what when where which while who whom whose why will with
    within without would yet you your
    """.split()  # noqa: SIM905
)


def clean_text(text: str) -> str:
    """Clean text as the stock Wan pipeline does, so that token spans stay where they are.

    Departs: the pipeline also repairs wrongly decoded letters if the package ftfy is installed; a
    video must not depend on that.
    """
    return " ".join(html.unescape(html.unescape(text)).split())


def content_words(text: str) -> tuple[Range, ...]:
    """Return where the words of an English text stand, without function words and punctuation."""
    return tuple(
        found.span() for found in _WORD.finditer(text) if found[0].lower() not in _FUNCTION_WORDS
    )


def find_words(words: Sequence[str], text: str) -> tuple[Range, ...]:
    """Return where `words` stand in a text, in order: whole words or phrases, in any case."""
    places = {
        found.span()
        for word in words
        for found in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
    }
    return tuple(sorted(places))
