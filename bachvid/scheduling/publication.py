"""One scene's keys and values on their way: what was published, who reads it, what may be dropped.

Bookkeeping of the driver, over opaque references: no Ray, no torch. A *part* is the keys and
values of one step, for one run of the frame videos that read it.

retain: one part for each step, for every run; kept until the scene is over.
window: parts in the order in which all frame videos of a wave read them; a part is dropped when
every one of them has gone past it, and only `window` parts are ever alive.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

from bachvid.engine.steps import RunStep

Ref = TypeVar("Ref")
Reader = TypeVar("Reader", bound=Hashable)


def part_key(reads: Sequence[Sequence[int]], step: RunStep) -> tuple[int, int] | None:
    """Return what a run of a frame video reads at a step, as (how many runs read before, step).

    None if the run reads nothing. These keys rise in the order of reading.
    """
    if not reads[step.run]:
        return None
    return sum(1 for steps in reads[: step.run] if steps), step.step


class Publication(Generic[Reader, Ref]):
    """The parts of one scene.

    Args:
        reads: the steps that each run of a frame video reads, as `config.read_steps` gives them.
        window: parts that may be alive at any time; None: retain.
    """

    def __init__(self, reads: Sequence[Sequence[int]], *, window: int | None) -> None:
        self._reads, self._window = reads, window
        self._keys = (
            [(0, step) for step in sorted({step for steps in reads for step in steps})]
            if window is None
            else [(run, step) for run, steps in enumerate(filter(None, reads)) for step in steps]
        )
        self._refs: dict[int, Ref] = {}
        self._passed: dict[Reader, int] = {}
        self._dropped = 0

    @property
    def records(self) -> list[list[int]]:
        """The steps to record in each run of the identity video.

        In a window it is run once to observe, and once more for each run that reads.
        """
        if self._window is None:
            return [[step for _, step in self._keys]]
        runs: list[list[int]] = [[]]
        for run, step in self._keys:
            if run + 1 == len(runs):
                runs.append([])
            runs[run + 1].append(step)
        return runs

    @property
    def keys(self) -> Sequence[tuple[int, int]]:
        """The parts in the order of publication, as `part_key` names them; retained: of run 0."""
        return self._keys

    @property
    def num_parts(self) -> int:
        """Parts of a whole publication."""
        return len(self._keys)

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
        passed = part_key(self._reads, step)
        if passed is not None:
            self._passed[reader] = sum(1 for key in self._keys if key <= passed)
            self._drop()

    def _drop(self) -> None:
        if self._window is None:
            return
        passed = min(self._passed.values(), default=self.num_parts)
        for part in range(self._dropped, passed):
            self._refs.pop(part, None)
        self._dropped = max(self._dropped, passed)
