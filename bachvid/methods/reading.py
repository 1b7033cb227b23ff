"""How the pieces of an identity video are published to its frame videos, part by part. No torch.

A *part* is the pieces of one recorded step.

retain: one part per recorded step, in ascending order; every run reads the same parts.
window: one part per read, in the order in which all frame videos read, so that a part can be
dropped once every reader is past it. The identity video is then run once to be observed, and once
more for each run that reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bachvid.methods.base import Method, Run


class ReadingOrder:
    """The parts that a scene publishes, and the runs of its identity video that make them."""

    def __init__(self, method: Method[Any], *, is_window: bool) -> None:
        self._frame_runs = method.runs("frame")
        self._reading = [run for run in self._frame_runs if run.reads]
        self.is_window = is_window
        *_, whole = method.runs("identity")
        self.identity_runs: tuple[Run, ...] = (whole,)
        self.steps: tuple[int, ...] = method.records.steps  # recorded, of each part
        if is_window and self._reading:
            self.identity_runs = _runs_in_window(whole, self._reading, method.observed_at)
            self.steps = tuple(step for run in self.identity_runs for step in run.records)

    @property
    def num_parts(self) -> int:
        """The number of parts that a scene publishes."""
        return len(self.steps)

    def part(self, reading_run: int, place: int) -> int:
        """Return the part that holds a read, by its place in the reads of a run that reads."""
        if not self.is_window:
            return self.steps.index(self._reading[reading_run].sources[place])
        return sum(len(run.reads) for run in self._reading[:reading_run]) + place

    def passed(self, run: int, step: int) -> int:
        """Return how many of the first parts a reader no longer needs after a step.

        None without a window, since then any step may be read again.
        """
        if not self.is_window:
            return 0
        before = sum(len(earlier.reads) for earlier in self._frame_runs[:run])
        return before + sum(read.step <= step for read in self._frame_runs[run].reads)


def can_stream(method: Method[Any]) -> bool:
    """Return whether a window suits a method: runs read ascending steps, none ahead of their own.

    Otherwise a reader would wait for a step that the identity video, in lockstep, has not reached,
    or that was dropped.
    """
    return all(
        all(read.source <= read.step for read in run.reads)
        and list(run.sources) == sorted(set(run.sources))
        for run in method.runs("frame")
    )


def _runs_in_window(whole: Run, reading: Sequence[Run], observed_at: int | None) -> tuple[Run, ...]:
    runs = []
    if observed_at is not None:
        runs.append(replace(whole, steps=_up_to(whole, observed_at), records=()))
    for run in reading[:-1]:
        runs.append(replace(whole, steps=_up_to(whole, max(run.sources)), records=run.sources))
    return (*runs, replace(whole, records=reading[-1].sources))


def _up_to(whole: Run, last: int) -> tuple[int, ...]:
    return tuple(step for step in whole.steps if step <= last)
