"""Publication: which parts live, who waits for whom."""

from __future__ import annotations

import pytest
from reading_methods import ReadingMethod

from bachvid.engine.results import RunStep
from bachvid.methods.reading import ReadingOrder
from bachvid.scheduling.publication import Publication

# A plain pre-pass, one that injects, the main run.
METHOD = ReadingMethod((), (0, 1), (0, 1, 2, 3))


def window(size: int = 2) -> Publication[str, str]:
    return Publication(ReadingOrder(METHOD, is_window=True), window=size)


def test_retained_parts_serve_every_run_and_stay() -> None:
    scene: Publication[str, str] = Publication(ReadingOrder(METHOD, is_window=False), window=None)
    assert (scene.num_parts, scene.credit) == (4, 4)
    scene.join("jumps")
    for part in range(4):
        scene.publish(part, f"step {part}")
    for run, last in ((0, 1), (1, 1), (2, 5)):
        for step in range(last + 1):
            scene.stepped("jumps", RunStep(run, step))
    scene.leave("jumps")
    assert scene.parts == {part: f"step {part}" for part in range(4)}
    scene.join("late")
    assert (scene.readers, scene.dropped) == (["late"], 0)


def test_a_part_is_dropped_when_the_slowest_reader_has_passed_it() -> None:
    scene = window()
    scene.join("jumps")
    scene.join("waves")
    scene.publish(0, "a")
    scene.publish(1, "b")
    assert scene.credit == 2
    scene.stepped("jumps", RunStep(0, 1))  # a pre-pass that reads nothing
    assert scene.credit == 2
    scene.stepped("jumps", RunStep(1, 0))
    scene.stepped("jumps", RunStep(1, 1))
    assert (dict(scene.parts), scene.credit) == ({0: "a", 1: "b"}, 2)
    scene.stepped("waves", RunStep(1, 0))
    assert (dict(scene.parts), scene.credit, scene.dropped) == ({1: "b"}, 3, 1)
    scene.publish(2, "c")
    scene.leave("waves")  # dead: nobody waits for it
    assert (dict(scene.parts), scene.credit) == ({2: "c"}, 4)
    scene.stepped("jumps", RunStep(2, 5))  # a step behind the injected ones
    assert (dict(scene.parts), scene.dropped) == ({}, 6)


def test_steps_that_read_nothing_pass_nothing() -> None:
    scene = window()
    scene.join("jumps")
    scene.publish(0, "a")
    scene.stepped("jumps", RunStep(0, 1))
    assert (dict(scene.parts), scene.credit) == ({0: "a"}, 2)


def test_a_window_without_readers_lets_the_identity_video_end() -> None:
    scene = window()
    scene.publish(0, "nobody's")
    assert (dict(scene.parts), scene.credit) == ({}, 6)
    scene.join("jumps")
    assert scene.credit == 2
    scene.publish(0, "a")
    scene.leave("jumps")
    scene.publish(1, "b")
    assert (dict(scene.parts), scene.dropped) == ({}, 6)
    assert scene.credit >= scene.num_parts


def test_lost_parts_are_published_again() -> None:
    scene = window()
    scene.join("jumps")
    scene.publish(0, "a")
    scene.stepped("jumps", RunStep(1, 0))
    scene.publish(1, "b")
    scene.clear()
    assert (dict(scene.parts), scene.dropped, scene.readers) == ({}, 1, ["jumps"])
    scene.publish(1, "b2")
    assert dict(scene.parts) == {1: "b2"}


def test_an_identity_that_runs_again_fills_only_what_is_needed() -> None:
    scene = window()
    scene.join("jumps")
    scene.publish(0, "a")
    scene.stepped("jumps", RunStep(1, 0))
    for part, ref in enumerate(("a2", "b2")):
        scene.publish(part, ref)
    assert dict(scene.parts) == {1: "b2"}


def test_nobody_joins_a_window_that_has_moved() -> None:
    scene = window()
    scene.join("jumps")
    scene.stepped("jumps", RunStep(1, 0))
    with pytest.raises(AssertionError, match="first parts are gone"):
        scene.join("late")
