"""What an identity run leaves behind: pieces, by layer, step and branch. No torch.

A *piece* is one tensor of one site, all rows of the video and a rank's heads. Packing, checking,
storing, streaming and counting all follow the list that a `Records` makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bachvid.layout.gangs import BRANCHES, Branch

Kind = Literal["query", "key", "value", "out"]
KINDS: tuple[Kind, ...] = ("query", "key", "value", "out")


class AttentionSite(NamedTuple):
    """The place of an attention call in a run. `step` and `layer` count from 0."""

    step: int
    layer: int
    branch: Branch


@dataclass(frozen=True, slots=True)
class RecordSet:
    """Pieces of these kinds, at every combination of these layers, steps and branches."""

    kinds: tuple[Kind, ...]
    layers: tuple[int, ...]
    steps: tuple[int, ...]
    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class Records:
    """What is recorded, as a union of sets: layers may differ in kinds, and kinds in steps.

    All orders are fixed: steps and layers rise, branches are as in `BRANCHES`, kinds as in
    `KINDS`.
    """

    sets: tuple[RecordSet, ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at which anything is recorded."""
        return _rising(step for each in self._nonempty for step in each.steps)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers at which anything is recorded."""
        return _rising(layer for each in self._nonempty for layer in each.layers)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches of which anything is recorded."""
        found = {branch for each in self._nonempty for branch in each.branches}
        return tuple(branch for branch in BRANCHES if branch in found)

    def kinds(self, site: AttentionSite) -> tuple[Kind, ...]:
        """Return the kinds of pieces that are recorded at a site."""
        found = {
            kind
            for each in self.sets
            if site.step in each.steps
            and site.layer in each.layers
            and site.branch in each.branches
            for kind in each.kinds
        }
        return tuple(kind for kind in KINDS if kind in found)

    def sites(self, step: int, branches: Sequence[Branch] = BRANCHES) -> tuple[AttentionSite, ...]:
        """Return the sites of a step with any piece: layer by layer, each in order of `branches`.

        `branches` are those that share a forward, or that a rank computes.
        """
        sites = (AttentionSite(step, layer, branch) for layer in self.layers for branch in branches)
        return tuple(site for site in sites if self.kinds(site))

    def pieces(
        self, step: int, branches: Sequence[Branch] = BRANCHES
    ) -> tuple[tuple[AttentionSite, Kind], ...]:
        """Return the pieces of a step, in the order of its `sites`."""
        return tuple(
            (site, kind) for site in self.sites(step, branches) for kind in self.kinds(site)
        )

    @property
    def num_pieces(self) -> int:
        """The number of pieces of all steps, layers and branches."""
        return sum(len(self.pieces(step)) for step in self.steps)

    @property
    def _nonempty(self) -> tuple[RecordSet, ...]:
        """The sets that are not empty."""
        return tuple(
            each
            for each in self.sets
            if each.kinds and each.layers and each.steps and each.branches
        )


NO_RECORDS = Records()


def _rising(numbers: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers)))
