"""One scene's pieces on their way: what was published, who reads it, what may be dropped.

Bookkeeping of the driver, over opaque references: no Ray, no torch. What a part is, and which of
them are made, says `bachvid.methods.reading`. Retained parts are kept until the scene is over; in
a window a part is dropped when every reader has gone past it, and only so many are ever alive.
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
        """How many parts, the first ones, nobody needs any more."""
        return self._dropped

    @property
    def credit(self) -> int:
        """How many parts may be published, counted from the first one of all."""
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
        """Keep a part that somebody needs; one that is published again takes its place."""
        if self._window is None or (self._passed and part >= self._dropped):
            self._refs[part] = ref

    def clear(self) -> None:
        """Forget all parts: they are lost. Readers go on with what is published again."""
        self._refs.clear()

    def join(self, reader: Reader) -> None:
        """Count on `reader`, from the first part on."""
        assert self._window is None or self._dropped == 0, "its first parts are gone"
        self._passed[reader] = 0

    def leave(self, reader: Reader) -> None:
        """No longer wait for `reader`: it is done, or dead."""
        self._passed.pop(reader, None)
        self._drop()

    def stepped(self, reader: Reader, step: RunStep) -> None:
        """Note that a reader has done a step of a run, so that it needs its part no more."""
        self._passed[reader] = self._reading.passed(step.run, step.step)
        self._drop()

    def _drop(self) -> None:
        if self._window is None:
            return
        passed = min(self._passed.values(), default=self.num_parts)
        for part in range(self._dropped, passed):
            self._refs.pop(part, None)
        self._dropped = max(self._dropped, passed)
