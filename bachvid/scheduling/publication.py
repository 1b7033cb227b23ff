"""Keeps track of the published pieces of a scene: which there are, who reads them, what to drop.

Bookkeeping of the driver, over opaque references: no Ray, no torch. `bachvid.methods.reading`
defines the parts. Retained parts are kept until the scene is over. In a window a part is dropped
when every reader has gone past it, and the number of parts alive is limited.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from bachvid.engine.results import RunStep
from bachvid.methods.reading import ReadingOrder

Ref = TypeVar("Ref")
Reader = TypeVar("Reader", bound=Hashable)


class Publication(Generic[Reader, Ref]):
    """The parts of one scene, numbered in the order in which they are published.

    Args:
        reading: which parts there are.
        window: parts that may be alive at any time; None: all are retained.
    """

    def __init__(self, reading: ReadingOrder, *, window: int | None) -> None:
        self._reading, self._window = reading, window
        self._refs: dict[int, Ref] = {}
        self._passed: dict[Reader, int] = {}
        self._dropped = 0

    @property
    def num_parts(self) -> int:
        """Parts of a whole publication."""
        return self._reading.num_parts

    @property
    def dropped(self) -> int:
        """The number of parts, counted from the first, that nobody needs any more."""
        return self._dropped

    @property
    def credit(self) -> int:
        """The number of parts, counted from the first, that may be published by now."""
        if self._window is None or not self._passed:
            return self.num_parts
        return self._dropped + self._window

    @property
    def parts(self) -> Mapping[int, Ref]:
        """The parts that are alive."""
        return self._refs

    @property
    def readers(self) -> list[Reader]:
        """Who reads."""
        return list(self._passed)

    def publish(self, part: int, ref: Ref) -> None:
        """Keep a part that somebody needs. One that is published again replaces the earlier one."""
        if self._window is None or (self._passed and part >= self._dropped):
            self._refs[part] = ref

    def clear(self) -> None:
        """Forget all parts: they are lost. Readers go on with what is published again."""
        self._refs.clear()

    def join(self, reader: Reader) -> None:
        """Add a reader, which needs all parts."""
        assert self._window is None or self._dropped == 0, "its first parts are gone"
        self._passed[reader] = 0

    def leave(self, reader: Reader) -> None:
        """Remove a reader that is done or dead."""
        self._passed.pop(reader, None)
        self._drop()

    def stepped(self, reader: Reader, step: RunStep) -> None:
        """Note that a reader has done a step of a run, and no longer needs the parts before it."""
        self._passed[reader] = self._reading.passed(step.run, step.step)
        self._drop()

    def _drop(self) -> None:
        if self._window is None:
            return
        passed = min(self._passed.values(), default=self.num_parts)
        for part in range(self._dropped, passed):
            self._refs.pop(part, None)
        self._dropped = max(self._dropped, passed)
