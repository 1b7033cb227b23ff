"""What an identity run leaves behind: pieces of attention, by layer, step and branch. No torch.

A *piece* is one tensor of one site, all rows of the video and a rank's heads. What packs, checks,
stores, streams and counts pieces does so from the list that a `Records` makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bachvid.layout.gangs import BRANCHES, Branch

Kind = Literal["query", "key", "value", "out"]
KINDS: tuple[Kind, ...] = ("query", "key", "value", "out")


class AttentionSite(NamedTuple):
    """Where in a run an attention call is. `step` and `layer` count from 0."""

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
        """Steps of which anything is recorded."""
        return _rising(step for part in self._parts for step in part.steps)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of which anything is recorded."""
        return _rising(layer for part in self._parts for layer in part.layers)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Branches of which anything is recorded."""
        found = {branch for part in self._parts for branch in part.branches}
        return tuple(branch for branch in BRANCHES if branch in found)

    def kinds(self, site: AttentionSite) -> tuple[Kind, ...]:
        """Return the kinds of pieces recorded at a site; none if nothing is."""
        found = {
            kind
            for part in self.sets
            if site.step in part.steps
            and site.layer in part.layers
            and site.branch in part.branches
            for kind in part.kinds
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
        """Pieces of all steps, layers and branches."""
        return sum(len(self.pieces(step)) for step in self.steps)

    @property
    def _parts(self) -> tuple[RecordSet, ...]:
        """The sets that are not empty."""
        return tuple(
            part
            for part in self.sets
            if part.kinds and part.layers and part.steps and part.branches
        )


NO_RECORDS = Records()


def _rising(numbers: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers)))
