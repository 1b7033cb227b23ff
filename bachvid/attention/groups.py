"""The ranks that share one video."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SequenceGroup(Protocol):
    """The ranks that share one video, as one of them sees them.

    `size` ranks share the tokens of a branch in equal raster chunks (here S and N are a rank's
    rows, pads included). With `cfg_size` 2 there are two such sets, that of `cfg_rank` 0 for the
    branch uncond. Every method is a collective: all ranks call it, with tensors of one shape.
    """

    @property
    def rank(self) -> int:
        """The rank among those that share a branch."""

    @property
    def size(self) -> int:
        """The ranks that share a branch."""

    @property
    def cfg_rank(self) -> int:
        """0 or, in the ranks that compute the branch cond apart, 1."""

    @property
    def cfg_size(self) -> int:
        """1 if every rank computes both branches, 2 if each computes one."""

    def to_heads(self, x_BSHD: Tensor) -> Tensor:
        """Return [B, size * S, H / size, D]: all rows of this rank's heads (all-to-all)."""

    def to_tokens(self, x_BSHD: Tensor) -> Tensor:
        """Return [B, S / size, H * size, D]: this rank's rows of all heads; undoes `to_heads`."""

    def gather_heads(self, x_BTHD: Tensor) -> Tensor:
        """Return [B, T, H * size, D]: the heads of all ranks, in order."""

    def gather_tokens(self, x_BNC: Tensor) -> Tensor:
        """Return [B, size * N, C]: the rows of all ranks, in raster order."""

    def sum(self, x: Tensor) -> Tensor:
        """Add over the ranks that share a branch."""

    def from_cond(self, x: Tensor) -> Tensor:
        """Return what the rank of the branch cond has; that of uncond gives a shape and a dtype."""

    def gather_branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the ranks of uncond and of cond have. Only with `cfg_size` 2."""


class Alone:
    """The group of one rank, which has every row, head and branch."""

    rank = 0
    size = 1
    cfg_rank = 0
    cfg_size = 1

    def to_heads(self, x_BSHD: Tensor) -> Tensor:
        """Return x."""
        return x_BSHD

    def to_tokens(self, x_BSHD: Tensor) -> Tensor:
        """Return x."""
        return x_BSHD

    def gather_heads(self, x_BTHD: Tensor) -> Tensor:
        """Return x."""
        return x_BTHD

    def gather_tokens(self, x_BNC: Tensor) -> Tensor:
        """Return x."""
        return x_BNC

    def sum(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def from_cond(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def gather_branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Refuse: this rank has both branches."""
        raise AssertionError("only ranks that compute one branch each gather branches")


ALONE: SequenceGroup = Alone()
