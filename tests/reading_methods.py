"""A method that is nothing but what its runs read: for tests of how pieces travel."""

from __future__ import annotations

from collections.abc import Sequence

from bachvid.layout.records import Records, RecordSet
from bachvid.methods.base import Method, MethodConfig, Read, Role, Run, reads_own


class ReadingMethod(Method[MethodConfig]):
    """Frame videos have one run for each of `reads`; the identity is observed at step 1 of 6."""

    def __init__(self, *reads: Sequence[int | Read], observed_at: int | None = 1) -> None:
        super().__init__(MethodConfig(name="reading"), num_steps=6)
        self._reads = [
            tuple(read if isinstance(read, Read) else reads_own([read])[0] for read in run)
            for run in reads
        ]
        self._observed_at = observed_at

    @property
    def records(self) -> Records:
        steps = sorted({read.source for run in self._reads for read in run})
        return Records((RecordSet(("key",), (0,), tuple(steps), ("cond",)),))

    @property
    def observed_at(self) -> int | None:
        return self._observed_at

    def runs(self, role: Role) -> tuple[Run, ...]:
        if role == "identity":
            return super().runs(role)
        *first, last = self._reads
        pre_passes = [Run((0, 1), reads=reads) for reads in first]
        return (*pre_passes, Run(tuple(range(6)), reads=last))
