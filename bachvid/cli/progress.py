"""Shows on stderr how a render goes: a live bar, or one line for each stage."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

from bachvid.driver.events import Done, Event, Failed, FrameStep, IdentityStep, Published, Queued
from bachvid.inputs.story import IDENTITY_ID
from bachvid.planning.plan import RenderPlan
from bachvid.units import format_bytes


class Progress(AbstractContextManager["Progress"], Protocol):
    """Receives every event, in order."""

    def show(self, event: Event) -> None:
        """Show `event`."""


def open_progress(plan: RenderPlan) -> Progress:
    """Return a live bar where stderr is a terminal, else lines."""
    return BarProgress(plan) if sys.stderr.isatty() else LineProgress()


class LineProgress:
    """One line for each stage, for logs and pipes."""

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Do nothing: every line has been written."""

    def show(self, event: Event) -> None:
        """Write the line of `event`, if it ends a stage."""
        line = stage_line(event)
        if line:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


class BarProgress:
    """A bar over all steps with the time left, and the stage lines above it."""

    def __init__(self, plan: RenderPlan) -> None:
        from rich.console import Console  # only a terminal needs it
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._plan = plan
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self.bar.add_task("loading the model", total=0)
        self._scenes: set[str] = set()
        self._total = 0

    def __enter__(self) -> BarProgress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def show(self, event: Event) -> None:
        """Move the bar, and write the line of `event` above it."""
        match event:
            case Queued():
                self._expect(event)
            case IdentityStep():
                self._advance(f"{event.scene}/{IDENTITY_ID}")
            case FrameStep():
                stage = ", pre-pass" if event.phase == "pre_pass" else ""
                self._advance(f"{event.scene}/{event.video}{stage}")
        line = stage_line(event)
        if line:
            self.bar.console.print(line, markup=False, highlight=False)

    def _expect(self, event: Queued) -> None:
        if event.scene not in self._scenes:  # its identity is rendered for any of its videos
            self._scenes.add(event.scene)
            self._total += self._plan.num_steps(IDENTITY_ID)
        if event.video != IDENTITY_ID:
            self._total += self._plan.num_steps(event.video)
        self.bar.update(self._task, total=self._total)

    def _advance(self, stage: str) -> None:
        self.bar.update(self._task, advance=1, description=stage)


def stage_line(event: Event) -> str:
    """Return the line about a stage that has ended; empty if none has."""
    match event:
        case Published():
            return f"{event.scene}: {format_bytes(event.cache_bytes)} of keys and values recorded"
        case Done() if event.is_resumed:
            return f"{event.scene}/{event.video}: done before, {event.path}"
        case Done():
            recovered = "".join(f"; {text}" for text in event.recoveries)
            return f"{event.scene}/{event.video}: {event.seconds:.1f} s, {event.path}{recovered}"
        case Failed():
            return f"{event.scene}/{event.video}: failed: {event.error}"
    return ""
