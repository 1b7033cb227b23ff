"""What a control sees, and what it may do: the seam between a method and a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from bachvid.layout.gangs import Branch


class AttentionSite(NamedTuple):
    """Where in a run an attention call is. `step` and `layer` count from 0."""

    step: int
    layer: int
    branch: Branch


class QKV(NamedTuple):
    """Queries, keys and values of one layer: after qk-norm, before RoPE, joint rows."""

    query_BSHD: Tensor
    key_BSHD: Tensor
    value_BSHD: Tensor


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Query rows that also attend to given keys and values, beside the sequence's own.

    Keys are before RoPE; `positions_M` (int64) are the video positions that they take.
    `query_rows_Q` (int64) are joint rows. The groups of one site share no query row.
    """

    query_rows_Q: Tensor
    key_BMHD: Tensor
    value_BMHD: Tensor
    positions_M: Tensor


class AttentionControl:
    """What a method does at every attention site; this one does nothing.

    A control sees the batch rows of one CFG branch at a time.
    """

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        """Record or change queries, keys and values of every token, before RoPE.

        Of this rank's heads.
        """
        return qkv

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        """Return the keys and values that some query rows shall also attend to."""
        return ()

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        """Record or change the attention output of all heads, before the output projection.

        Of the text and this rank's video rows (`RunContext.positions`).
        """
        return out_BSC

    def cross(self, site: AttentionSite, query_BSHD: Tensor, key_BTHD: Tensor) -> None:
        """Look at the attention to the text, in models that have it apart: no RoPE, all heads.

        The queries are this rank's video rows, the keys all text tokens, pads included.
        """
