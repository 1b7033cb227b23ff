"""Gangs: the ranks that share one video, and which branches and heads each of them computes.

Pure: no torch. Sequence ranks are adjacent: rank = cfg_rank * sequence + sequence_rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Branch = Literal["uncond", "cond"]
BRANCHES: tuple[Branch, ...] = ("uncond", "cond")


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one rank of a gang computes: which CFG branches, and which attention heads."""

    branches: tuple[Branch, ...]
    first_head: int
    num_heads: int

    @property
    def last_head(self) -> int:
        """One past the last head of this rank."""
        return self.first_head + self.num_heads


@dataclass(frozen=True, slots=True)
class Gang:
    """`size` ranks that render one video together.

    With `cfg` 2 one half computes the unconditional branch, the other half the conditional one.
    With `cfg` 1 every rank computes both.
    """

    size: int = 1
    cfg: int = 1

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens of one branch: the degree of sequence parallelism."""
        return self.size // self.cfg

    def share(self, rank: int, num_heads: int) -> RankShare:
        """Return the share of a rank, of a model with `num_heads` attention heads."""
        cfg_rank, sequence_rank = divmod(rank, self.sequence)
        heads = num_heads // self.sequence
        branches = BRANCHES if self.cfg == 1 else (BRANCHES[cfg_rank],)
        return RankShare(branches, sequence_rank * heads, heads)

    def shares(self, num_heads: int) -> list[RankShare]:
        """Return the shares of all ranks."""
        return [self.share(rank, num_heads) for rank in range(self.size)]


def cut_passes(
    passes: Sequence[Sequence[Branch]], branches: Sequence[Branch]
) -> tuple[tuple[Branch, ...], ...]:
    """Return `ModelFacts.passes` restricted to `branches`."""
    cut = (tuple(branch for branch in shared if branch in branches) for shared in passes)
    return tuple(shared for shared in cut if shared)


def overlapping_ranks(
    reader: RankShare, writers: Sequence[RankShare], branches: Sequence[Branch]
) -> list[int]:
    """Return the ranks of a gang that record anything that a rank of another gang reads.

    `branches` are those that are recorded at all.
    """
    return [
        rank
        for rank, writer in enumerate(writers)
        if writer.first_head < reader.last_head
        and reader.first_head < writer.last_head
        and set(branches) & set(writer.branches) & set(reader.branches)
    ]
