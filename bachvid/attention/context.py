"""Where a run currently is, as the loop tells the controls."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bachvid.attention.groups import ALONE, SequenceGroup
from bachvid.attention.rotary import Rotary
from bachvid.layout.gangs import BRANCHES, Branch
from bachvid.layout.records import AttentionSite
from bachvid.layout.tokens import TokenLayout


@dataclass(slots=True)
class RunContext:
    """Where the run currently is. The loop updates it before every forward.

    The batch rows of a forward are grouped by branch, in the order of `branches`.
    """

    layout: TokenLayout
    rotary: Rotary
    step: int = 0
    branches: tuple[Branch, ...] = BRANCHES
    group: SequenceGroup = ALONE

    def site(self, layer: int, branch: Branch) -> AttentionSite:
        """Return the site of this step."""
        return AttentionSite(self.step, layer, branch)

    @property
    def positions(self) -> slice:
        """The video positions of this rank's rows, without padding."""
        return self.layout.rank_positions(self.group.rank, self.group.size)

    def gather_positions(self, x_NC: Tensor) -> Tensor:
        """Gather the rows of the whole video from those of each rank's positions: a collective.

        `x_NC` may have any dtype; the rows are in raster order.
        """
        return self.group.gather_tokens(x_NC[None], self.layout.video_tokens)[0]
