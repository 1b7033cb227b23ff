"""What a control sees, and what it may do: the seam between a method and a model.

Imports no torch, so that the file of a method can hold its data and its controls. Shape suffixes
of the whole package: B videos of one CFG branch, S joint tokens [text | video], N and M video
tokens of the frame and the identity video, T text tokens, Q selected query rows, H heads,
D channels per head, C model channels.

Several ranks may share one video. Between the calls of attention a rank has the text and its own
video rows, of all heads; within, all rows of its own heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bachvid.layout.records import AttentionSite

if TYPE_CHECKING:
    from torch import Tensor


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


class Guided(NamedTuple):
    """The predictions of one step, of the whole video on every rank: in the model's own layout.

    `uncond` is None without guidance. `estimate` turns a prediction into the video that it expects
    (x0 hat).
    """

    step: int
    cond: Tensor
    uncond: Tensor | None
    scale: float
    latents: Tensor
    estimate: Callable[[Tensor], Tensor]


class Denoised(NamedTuple):
    """A step, the latents that it leaves, and the video that they are expected to become."""

    step: int
    latents: Tensor
    estimate: Tensor


class AttentionControl:
    """What a method does in one run; this one does nothing.

    Every call is a no-op by default, and a tensor that is returned unchanged keeps the fast path:
    one plain attention call for the whole batch, bit-equal to diffusers. At a site a control sees
    the batch rows of one CFG branch at a time.
    """

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        """Record or change queries, keys and values, before RoPE: all tokens, this rank's heads."""
        return qkv

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        """Return any number of groups of queries with more keys; no row in two of them."""
        return ()

    def mix(self, site: AttentionSite, out_BSHD: Tensor) -> Tensor:
        """Record or change what attention gave: all tokens, this rank's heads.

        Before the ranks exchange rows, so that what is linear per token needs no other rank.
        """
        return out_BSHD

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        """Record or change the attention output of all heads, before the output projection.

        Of the text and this rank's video rows (`RunContext.positions`).
        """
        return out_BSC

    def cross(self, site: AttentionSite, query_BSHD: Tensor, key_BTHD: Tensor) -> None:
        """Look at the attention to the text, in models that have it apart: no RoPE, all heads.

        The queries are this rank's video rows, the keys all text tokens, pads included.
        """

    def guide(self, predicted: Guided) -> Tensor:
        """Return the prediction that the solver follows; here as the stock pipelines guide."""
        if predicted.uncond is None:
            return predicted.cond
        return predicted.uncond + predicted.scale * (predicted.cond - predicted.uncond)

    def stepped(self, done: Denoised) -> None:
        """Note what a step left, once the solver has advanced."""
