"""The one seam between a method and a model: what a control sees, and the attention it changes.

Knows no model, no method and no worker. Shape suffixes of the whole package: B videos of one CFG
branch, S joint tokens [text | video], N and M video tokens of the frame and the identity video,
T text tokens, Q selected query rows, H heads, D channels per head, C model channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bachvid.errors import LayoutError
from bachvid.tokens import TokenLayout

Branch = Literal["cond", "uncond"]


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
class Rotary:
    """The rotary table of a video: fp32, interleaved pairs, one row per video position.

    Without tables (`Rotary.none()`) positions live in the features, and `rotate` changes nothing.
    """

    cos_ND: Tensor | None
    sin_ND: Tensor | None

    @classmethod
    def none(cls) -> Rotary:
        """Give the rotary of a model that has no RoPE."""
        return cls(None, None)

    @property
    def is_none(self) -> bool:
        """Whether the model has no RoPE."""
        return self.cos_ND is None

    def rotate(self, x_BSHD: Tensor, positions_S: Tensor | None = None) -> Tensor:
        """Rotate each token to its video position; without `positions_S`, token i to position i.

        The arithmetic is that of diffusers' `apply_rotary_emb(use_real_unbind_dim=-1)`, and so are
        the results, bit by bit: fp32, then back to the dtype of `x_BSHD`.

        Raises:
            LayoutError: if no positions are given and the table has another number of rows.
        """
        if self.cos_ND is None or self.sin_ND is None:
            return x_BSHD
        cos_ND, sin_ND = self.cos_ND.to(x_BSHD.device), self.sin_ND.to(x_BSHD.device)
        if positions_S is not None:
            cos_ND, sin_ND = cos_ND[positions_S], sin_ND[positions_S]
        if len(cos_ND) != x_BSHD.shape[1]:
            raise LayoutError(
                f"cannot rotate {x_BSHD.shape[1]} tokens with a rotary table of {len(cos_ND)} "
                f"rows: pass video tokens only, or the position of each token"
            )
        pairs = x_BSHD.reshape(*x_BSHD.shape[:-1], x_BSHD.shape[-1] // 2, 2)
        real, imaginary = pairs.unbind(-1)
        turned_BSHD = torch.stack([-imaginary, real], dim=-1).flatten(-2)
        rotated = x_BSHD.float() * cos_ND[:, None] + turned_BSHD.float() * sin_ND[:, None]
        return rotated.to(x_BSHD.dtype)

    def rotate_joint(self, x_BSHD: Tensor, layout: TokenLayout) -> Tensor:
        """Rotate the video rows of a joint sequence; text rows have no position."""
        if self.is_none:
            return x_BSHD
        video_BNHD = self.rotate(x_BSHD[:, layout.video_rows])
        return torch.cat([x_BSHD[:, layout.text_rows], video_BNHD], dim=1)


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
        """Record or change queries, keys and values of every token, before RoPE."""
        return qkv

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        """Give the keys and values that some query rows shall also attend to."""
        return ()

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        """Record or change the attention output of all heads, before the output projection."""
        return out_BSC


@dataclass(slots=True)
class RunContext:
    """The loop's word to the controls: where the run is. Set before every forward.

    The batch rows of a forward are grouped by branch, in the order of `branches`.
    """

    layout: TokenLayout
    rotary: Rotary
    step: int = 0
    branches: tuple[Branch, ...] = ("uncond", "cond")

    def site(self, layer: int, branch: Branch) -> AttentionSite:
        """Name the site of this step."""
        return AttentionSite(self.step, layer, branch)


def attend(qkv: QKV, groups: Sequence[KVGroup], rotary: Rotary, layout: TokenLayout) -> Tensor:
    """Attend over the joint sequence; the rows of a group also attend to its keys.

    Exact, by plain attention calls and without a mask: keys lie in one buffer as [A | F | B], F
    the sequence's own; rows of the first group see [A | F], rows of the second [F | B], all
    others F. Groups without a row or without a key are skipped; without any group this is one
    call, bit-equal to diffusers. Extra memory: the keys and values of the groups, and a copy of F.

    Returns out_BSHD.

    Raises:
        LayoutError: if the sequence does not fit `layout`, or there are more than two groups.
    Source: BachVid (arXiv 2510.21696v1), Sec. 3.5, Eq. (12)-(14).
    """
    num_rows = qkv.query_BSHD.shape[1]
    if num_rows != layout.joint_tokens:
        raise LayoutError(
            f"attention over {num_rows} tokens, but the layout {layout} has "
            f"{layout.joint_tokens}: render with the video size that the layout was made for"
        )
    query_BSHD = rotary.rotate_joint(qkv.query_BSHD, layout)
    key_BSHD = rotary.rotate_joint(qkv.key_BSHD, layout)
    used = [group for group in groups if len(group.query_rows_Q) and len(group.positions_M)]
    if not used:
        return _sdpa(query_BSHD, key_BSHD, qkv.value_BSHD)
    if len(used) > 2:
        raise LayoutError(f"{len(used)} key groups at one site: at most two can share its keys")

    keys = [rotary.rotate(group.key_BMHD, group.positions_M) for group in used]
    values = [group.value_BMHD for group in used]
    key_buffer = torch.cat([keys[0], key_BSHD, *keys[1:]], dim=1)
    value_buffer = torch.cat([values[0], qkv.value_BSHD, *values[1:]], dim=1)
    own = slice(keys[0].shape[1], keys[0].shape[1] + num_rows)
    spans = [slice(0, own.stop), slice(own.start, None)][: len(used)]
    calls = [(group.query_rows_Q, span) for group, span in zip(used, spans, strict=True)]
    calls.append((_other_rows([group.query_rows_Q for group in used], num_rows), own))
    out_BSHD = torch.empty_like(query_BSHD)
    for rows_Q, span in calls:
        if len(rows_Q):
            out_BQHD = _sdpa(query_BSHD[:, rows_Q], key_buffer[:, span], value_buffer[:, span])
            out_BSHD.index_copy_(1, rows_Q, out_BQHD)
    return out_BSHD


def controlled_attention(
    run: RunContext, control: AttentionControl, layer: int, qkv: QKV
) -> Tensor:
    """Run one layer's attention for all CFG branches of a forward, under `control`.

    Returns out_BSC, the attention output before the output projection. If no branch has groups,
    the whole batch is one plain attention call, as in diffusers.

    Raises:
        LayoutError: if the batch does not divide by the number of branches.
    """
    num_videos, remainder = divmod(len(qkv.query_BSHD), len(run.branches))
    if remainder:
        raise LayoutError(
            f"a batch of {len(qkv.query_BSHD)} rows does not divide into the branches "
            f"{list(run.branches)}: give every branch the same number of videos"
        )
    sites = [run.site(layer, branch) for branch in run.branches]
    given = [QKV(*parts) for parts in zip(*(torch.split(x, num_videos) for x in qkv), strict=True)]
    seen = [control.before(site, part) for site, part in zip(sites, given, strict=True)]
    groups = [control.extra(site, part) for site, part in zip(sites, seen, strict=True)]
    if any(groups):
        outs = [
            attend(part, extra, run.rotary, run.layout)
            for part, extra in zip(seen, groups, strict=True)
        ]
        out_BSC = torch.cat(outs).flatten(2)
    else:
        # One call for the batch: a call per branch would be slower and need not be bit-equal.
        if any(new is not old for new, old in zip(seen, given, strict=True)):
            qkv = QKV(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
        out_BSC = attend(qkv, (), run.rotary, run.layout).flatten(2)
    parts = torch.split(out_BSC, num_videos)
    changed = [control.after(site, part) for site, part in zip(sites, parts, strict=True)]
    if all(new is old for new, old in zip(changed, parts, strict=True)):
        return out_BSC
    return torch.cat(changed)


def _sdpa(query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor) -> Tensor:
    out_BHSD = F.scaled_dot_product_attention(
        query_BSHD.transpose(1, 2), key_BSHD.transpose(1, 2), value_BSHD.transpose(1, 2)
    )
    return out_BHSD.transpose(1, 2)


def _other_rows(groups: Sequence[Tensor], num_rows: int) -> Tensor:
    """Rows in none of the groups, ascending. By a sort: `nonzero` would wait for the GPU."""
    taken_S = torch.zeros(num_rows, dtype=torch.uint8, device=groups[0].device)
    for rows_Q in groups:
        taken_S[rows_Q] = 1
    return taken_S.argsort(stable=True)[: num_rows - sum(len(rows_Q) for rows_Q in groups)]
