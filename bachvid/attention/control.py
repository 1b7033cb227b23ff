"""What a control sees, and what it may do: the seam between a method and a model.

Imports no torch, so that a method's file can hold both its data and its controls. Shape suffixes
of the whole package: B videos of one CFG branch, S joint tokens [text | video], N and M video
tokens of the frame and the identity video, T text tokens, Q selected query rows, H heads,
D channels per head, C model channels.

Several ranks may share one video. Outside attention a rank holds the text and its own video rows,
with all heads; inside, it holds all rows, with its own heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bachvid.layout.records import AttentionSite

if TYPE_CHECKING:
    from torch import Tensor


class QKV(NamedTuple):
    """Queries, keys and values of one layer: joint rows, after qk-norm, before RoPE."""

    query_BSHD: Tensor
    key_BSHD: Tensor
    value_BSHD: Tensor


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Query rows that also attend to given keys and values, beside the sequence's own.

    Keys are before RoPE, which rotates them to the video positions `positions_M` (int64).
    `query_rows_Q` (int64) are joint rows. No two groups of a site share a query row.
    """

    query_rows_Q: Tensor
    key_BMHD: Tensor
    value_BMHD: Tensor
    positions_M: Tensor


class Guided(NamedTuple):
    """The predictions of one step, for the whole video on every rank, in the model's layout.

    `uncond` is None without guidance. `estimate` turns a prediction into its estimate of the final
    latents (x0 hat).
    """

    step: int
    cond: Tensor
    uncond: Tensor | None
    scale: float
    latents: Tensor
    estimate: Callable[[Tensor], Tensor]


class Denoised(NamedTuple):
    """A step, the latents after it, and its estimate of the final latents."""

    step: int
    latents: Tensor
    estimate: Tensor


class AttentionControl:
    """What a method does in one run. The base class does nothing.

    Every method is a no-op by default, and returning a tensor unchanged keeps the fast path: one
    plain attention call for the whole batch, bit-equal to diffusers. At a site, a control sees the
    batch rows of one CFG branch at a time.
    """

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        """Record or change queries, keys and values before RoPE: all tokens, this rank's heads."""
        return qkv

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        """Return groups of queries that attend to extra keys; no row may be in two groups."""
        return ()

    def mix(self, site: AttentionSite, out_BSHD: Tensor) -> Tensor:
        """Record or change the result of attention: all tokens, this rank's heads.

        Called before the ranks exchange rows, so what is linear per token needs no other rank.
        """
        return out_BSHD

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        """Record or change the attention output of all heads, before the output projection.

        The rows are the text and this rank's video rows (`RunContext.positions`).
        """
        return out_BSC

    def cross(self, site: AttentionSite, query_BSHD: Tensor, key_BTHD: Tensor) -> None:
        """Watch the cross-attention to the text, in models that have one: no RoPE, all heads.

        The queries are this rank's video rows, the keys all text tokens, padding included.
        """

    def guide(self, predicted: Guided) -> Tensor:
        """Return the prediction for the solver; by default guided as in the stock pipelines."""
        if predicted.uncond is None:
            return predicted.cond
        return predicted.uncond + predicted.scale * (predicted.cond - predicted.uncond)

    def stepped(self, done: Denoised) -> None:
        """Record the result of a step, after the solver has advanced."""
