"""Numbers and lists as people read them."""

from __future__ import annotations

from collections.abc import Iterable


def format_bytes(count: int) -> str:
    """Format a byte count in decimal units (1 GB = 10^9 bytes)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def pluralize(number: int, noun: str) -> str:
    """Return a number and its noun, as 1 worker or 2 workers."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def join_words(words: Iterable[str], last: str) -> str:
    """Join words as "a", "a or b" or "a, b or c", with `last` before the last one."""
    *others, final = words
    return f"{', '.join(others)} {last} {final}" if others else final
