"""In which parts what an identity records travels, and which runs of it make them."""

from __future__ import annotations

import pytest
from reading_methods import ReadingMethod

from bachvid.methods.base import Read, Run
from bachvid.methods.reading import ReadingOrder, can_stream

METHOD = ReadingMethod((), (0, 1), (0, 1, 2, 3))  # a plain pre-pass, one that reads, the main run
WHOLE = tuple(range(6))


def test_retained_the_identity_runs_once_and_a_part_is_a_step() -> None:
    order = ReadingOrder(METHOD, is_window=False)
    assert order.identity_runs == (Run(WHOLE, records=(0, 1, 2, 3)),)
    assert (order.num_parts, order.steps) == (4, (0, 1, 2, 3))
    assert [order.part(0, place) for place in (0, 1)] == [0, 1]
    assert [order.part(1, place) for place in range(4)] == [0, 1, 2, 3]
    assert order.passed(2, 5) == 0  # another run may read it


def test_in_a_window_the_identity_is_observed_and_then_runs_for_each_run_that_reads() -> None:
    order = ReadingOrder(METHOD, is_window=True)
    assert order.identity_runs == (
        Run((0, 1)),
        Run((0, 1), records=(0, 1)),
        Run(WHOLE, records=(0, 1, 2, 3)),
    )
    assert (order.num_parts, order.steps) == (6, (0, 1, 0, 1, 2, 3))
    assert [order.part(0, place) for place in (0, 1)] == [0, 1]
    assert [order.part(1, place) for place in range(4)] == [2, 3, 4, 5]


def test_a_reader_has_passed_what_its_runs_have_read_so_far() -> None:
    order = ReadingOrder(METHOD, is_window=True)
    steps = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 3), (2, 5)]
    assert [order.passed(*step) for step in steps] == [0, 0, 1, 2, 3, 6, 6]


@pytest.mark.parametrize("is_window", [False, True])
def test_what_nobody_reads_is_not_published(is_window: bool) -> None:
    order = ReadingOrder(ReadingMethod(()), is_window=is_window)
    assert order.identity_runs == (Run(WHOLE),)
    assert order.num_parts == 0


def test_what_nobody_observes_needs_no_run_to_be_observed() -> None:
    order = ReadingOrder(ReadingMethod((2, 4), observed_at=None), is_window=True)
    assert order.identity_runs == (Run(WHOLE, records=(2, 4)),)


def test_a_run_may_read_another_step_and_one_twice() -> None:
    method = ReadingMethod((Read(0, 3), Read(1, 3), Read(4, 2)))
    order = ReadingOrder(method, is_window=False)
    assert order.steps == (2, 3)
    assert [order.part(0, place) for place in range(3)] == [1, 1, 0]
    assert not can_stream(method)


@pytest.mark.parametrize(
    ("reads", "can"),
    [
        ((0, 1, 2), True),
        ((Read(3, 1), Read(4, 2)), True),  # a step behind: it was published before
        ((Read(1, 2),), False),  # a step ahead: in lockstep it never comes
        ((Read(1, 1), Read(2, 1)), False),  # twice: dropped after the first time
        ((Read(2, 2), Read(3, 1)), False),
        ((), True),
    ],
)
def test_a_window_serves_reads_that_rise_with_the_steps(
    reads: tuple[int | Read, ...], can: bool
) -> None:
    assert can_stream(ReadingMethod(reads)) is can
