"""Where a run is: what the loop tells the controls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bachvid.attention.control import AttentionSite
from bachvid.attention.groups import ALONE, SequenceGroup
from bachvid.attention.rotary import Rotary
from bachvid.layout.gangs import BRANCHES, Branch
from bachvid.layout.tokens import TokenLayout


@dataclass(slots=True)
class RunContext:
    """The loop's word to the controls: where the run is. Set before every forward.

    The batch rows of a forward are grouped by branch, in the order of `branches`.
    """

    layout: TokenLayout
    rotary: Rotary
    step: int = 0
    branches: tuple[Branch, ...] = BRANCHES
    group: SequenceGroup = ALONE

    def site(self, layer: int, branch: Branch) -> AttentionSite:
        """Name the site of this step."""
        return AttentionSite(self.step, layer, branch)

    @property
    def positions(self) -> slice:
        """The video positions of this rank's rows, without pads."""
        return self.layout.rank_positions(self.group.rank, self.group.size)

    def gather_positions(self, x_NC: Tensor) -> Tensor:
        """Return the rows of the whole video, given this rank's: a collective."""
        if self.group.size == 1:
            return x_NC
        rows_BNC = _pad_rows(x_NC[None], self.layout.rank_tokens(self.group.size))
        return self.group.gather_tokens(rows_BNC)[0, : self.layout.video_tokens]


def _pad_rows(x_BS: Tensor, num_rows: int) -> Tensor:
    """Add rows of zeros at the end."""
    missing = num_rows - x_BS.shape[1]
    if not missing:
        return x_BS
    return torch.cat([x_BS, x_BS.new_zeros(len(x_BS), missing, *x_BS.shape[2:])], dim=1)
