"""The ranks that share one video. Shape suffixes: see `bachvid.attention.control`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bachvid.layout.tokens import TokenLayout


class SequenceGroup(Protocol):
    """The ranks that share one video, seen from one of them.

    `size` ranks share the tokens of a branch: each has all text rows and an equal raster chunk of
    the video rows; the last ranks may need padding behind it. With `cfg_size` 2 there are two such
    sets, and the one of `cfg_rank` 0 computes the uncond branch. Every method is a collective: all
    ranks call it, with tensors of the same shape.
    """

    @property
    def rank(self) -> int:
        """This rank's index among those that share a branch."""

    @property
    def size(self) -> int:
        """Number of ranks that share a branch."""

    @property
    def cfg_rank(self) -> int:
        """1 on ranks that compute only the cond branch, else 0."""

    @property
    def cfg_size(self) -> int:
        """1 if every rank computes both branches, 2 if each computes one."""

    def to_heads(self, x_BSHD: Tensor, layout: TokenLayout) -> Tensor:
        """Exchange this rank's rows of all heads for all joint rows of this rank's heads.

        `x_BSHD` has the text, then this rank's video rows and padding; the result has no padding.

        Raises:
            LayoutError: if `x_BSHD` has another number of rows than `layout` gives a rank.
        """

    def to_tokens(self, x_BSHD: Tensor, layout: TokenLayout) -> Tensor:
        """Undo `to_heads`: return this rank's rows of all heads, text first, without padding."""

    def gather_tokens(self, x_BNC: Tensor, num_tokens: int) -> Tensor:
        """Return [B, num_tokens, C]: the video rows of all ranks in raster order, without padding.

        `x_BNC` has this rank's rows, with or without padding.
        """

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks that share a branch, bitwise the same on all of them."""

    def from_cond(self, x: Tensor) -> Tensor:
        """Broadcast `x` from the cond rank; on the uncond rank only its shape and dtype matter."""

    def gather_branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x` of the uncond rank and of the cond rank. For `cfg_size` 2 only."""


class Alone:
    """A group of one rank, which has every row, head and branch: every method is the identity."""

    rank = 0
    size = 1
    cfg_rank = 0
    cfg_size = 1

    def to_heads(self, x_BSHD: Tensor, layout: TokenLayout) -> Tensor:
        return x_BSHD

    def to_tokens(self, x_BSHD: Tensor, layout: TokenLayout) -> Tensor:
        return x_BSHD

    def gather_tokens(self, x_BNC: Tensor, num_tokens: int) -> Tensor:
        return x_BNC

    def sum(self, x: Tensor) -> Tensor:
        return x

    def from_cond(self, x: Tensor) -> Tensor:
        return x

    def gather_branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("only ranks that compute one branch each gather branches")


ALONE: SequenceGroup = Alone()


def pad_rows(x_BS: Tensor, num_rows: int) -> Tensor:
    """Pad `x_BS` (any further dimensions) with rows of zeros; returns `x_BS` if none is missing."""
    missing = num_rows - x_BS.shape[1]
    if not missing:
        return x_BS
    return torch.cat([x_BS, x_BS.new_zeros(len(x_BS), missing, *x_BS.shape[2:])], dim=1)
