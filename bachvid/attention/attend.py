"""The one seam between a method and a model: what a control sees, and the attention it changes.

Knows no model, no method and no worker. Shape suffixes of the whole package: B videos of one CFG
branch, S joint tokens [text | video], N and M video tokens of the frame and the identity video,
T text tokens, Q selected query rows, H heads, D channels per head, C model channels.

Several ranks may share one video. Between the calls of attention a rank has the text and its own
video rows, of all heads; within, all rows of its own heads.

Long for one file, because what a control may rely on and the code that keeps it are read together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bachvid.attention.context import RunContext, _pad_rows
from bachvid.attention.control import QKV, AttentionControl, KVGroup
from bachvid.attention.rotary import Rotary
from bachvid.errors import LayoutError
from bachvid.layout.tokens import TokenLayout


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

    `qkv` and the result out_BSC, the attention output before the output projection, are of the
    rows that this rank has: all text rows, then its video rows, pads at the end. Pads are no keys,
    and no method sees them. If no branch has groups, the whole batch is one plain attention call,
    as in diffusers.

    Raises:
        LayoutError: if the batch does not divide by the number of branches, or the rows do not
            fit the layout.
    """
    num_videos = _videos_of_branch(run, qkv.query_BSHD)
    num_rows = qkv.query_BSHD.shape[1]
    if run.group.size > 1:
        qkv = QKV(*(_to_heads(run, x_BSHD) for x_BSHD in qkv))
    sites = [run.site(layer, branch) for branch in run.branches]
    given = [QKV(*parts) for parts in zip(*(torch.split(x, num_videos) for x in qkv), strict=True)]
    seen = [control.before(site, part) for site, part in zip(sites, given, strict=True)]
    groups = [control.extra(site, part) for site, part in zip(sites, seen, strict=True)]
    if any(groups):
        outs = [
            attend(part, extra, run.rotary, run.layout)
            for part, extra in zip(seen, groups, strict=True)
        ]
        out_BSHD = torch.cat(outs)
    else:
        # One call for the batch: a call per branch would be slower and need not be bit-equal.
        if any(new is not old for new, old in zip(seen, given, strict=True)):
            qkv = QKV(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
        out_BSHD = attend(qkv, (), run.rotary, run.layout)
    if run.group.size > 1:
        out_BSHD = _to_tokens(run, out_BSHD)
    out_BSC = out_BSHD.flatten(2)
    parts = torch.split(out_BSC, num_videos)
    changed = [control.after(site, part) for site, part in zip(sites, parts, strict=True)]
    if any(new is not old for new, old in zip(changed, parts, strict=True)):
        out_BSC = torch.cat(changed)
    return _pad_rows(out_BSC, num_rows)


def controlled_cross_attention(
    run: RunContext,
    control: AttentionControl,
    layer: int,
    query_BSHD: Tensor,
    key_BTHD: Tensor,
    value_BTHD: Tensor,
) -> Tensor:
    """Run one layer's attention from video to text for all branches, seen by `control`.

    Queries are the video rows that this rank has, pads at the end; they need no other rank.
    Returns out_BSC, before the output projection.

    Raises:
        LayoutError: if the batch does not divide by the number of branches.
    """
    num_videos = _videos_of_branch(run, query_BSHD)
    positions = run.positions
    own_BNHD = query_BSHD[:, : positions.stop - positions.start]
    parts = zip(torch.split(own_BNHD, num_videos), torch.split(key_BTHD, num_videos), strict=True)
    for branch, (query, key) in zip(run.branches, parts, strict=True):
        control.cross(run.site(layer, branch), query, key)
    return _sdpa(query_BSHD, key_BTHD, value_BTHD).flatten(2)


def _videos_of_branch(run: RunContext, query_BSHD: Tensor) -> int:
    num_videos, remainder = divmod(len(query_BSHD), len(run.branches))
    if remainder:
        raise LayoutError(
            f"a batch of {len(query_BSHD)} rows does not divide into the branches "
            f"{list(run.branches)}: give every branch the same number of videos"
        )
    return num_videos


def _to_heads(run: RunContext, x_BSHD: Tensor) -> Tensor:
    """Exchange this rank's rows of all heads for all joint rows, without pads, of its heads."""
    group, layout = run.group, run.layout
    rows = layout.text_tokens + layout.rank_tokens(group.size)
    if x_BSHD.shape[1] != rows:
        raise LayoutError(
            f"attention over {x_BSHD.shape[1]} tokens, but each of {group.size} ranks has {rows} "
            f"of the layout {layout}: render with the video size that the layout was made for"
        )
    video_BNHD = group.to_heads(x_BSHD[:, layout.text_tokens :].contiguous())
    heads = video_BNHD.shape[2]
    text_BTHD = x_BSHD[:, layout.text_rows, group.rank * heads : (group.rank + 1) * heads]
    return torch.cat([text_BTHD, video_BNHD[:, : layout.video_tokens]], dim=1)


def _to_tokens(run: RunContext, out_BSHD: Tensor) -> Tensor:
    """Undo `_to_heads`; the pads stay away."""
    group, layout = run.group, run.layout
    video_BNHD = out_BSHD[:, layout.video_rows].contiguous()
    video_BNHD = group.to_tokens(_pad_rows(video_BNHD, layout.rank_tokens(group.size) * group.size))
    own = run.positions
    video_BNHD = video_BNHD[:, : own.stop - own.start]
    if not layout.text_tokens:
        return video_BNHD
    text_BTHD = group.gather_heads(out_BSHD[:, layout.text_rows].contiguous())
    return torch.cat([text_BTHD, video_BNHD], dim=1)


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
