"""Errors are made to cross processes."""

from __future__ import annotations

import inspect
import pickle

import pytest

from bachvid import errors
from bachvid.errors import BachvidError

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, BachvidError)
]


def test_there_are_eight_kinds() -> None:
    assert len(KINDS) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_pickles(kind: type[BachvidError]) -> None:
    error = pickle.loads(pickle.dumps(kind("layer 9: there are 8")))
    assert type(error) is kind
    assert str(error) == "layer 9: there are 8"
