"""Attention that a control may watch and change.

Depends on no model, method or worker, and not on how many ranks share a video. Shape suffixes: see
`bachvid.attention.control`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionControl, KVGroup
from bachvid.attention.groups import pad_rows
from bachvid.attention.rotary import Rotary
from bachvid.errors import LayoutError
from bachvid.layout.records import AttentionSite
from bachvid.layout.tokens import TokenLayout


def attend(qkv: QKV, groups: Sequence[KVGroup], rotary: Rotary, layout: TokenLayout) -> Tensor:
    """Attend over the joint sequence; the rows of a group also attend to its keys.

    Exact: plain attention calls, no mask. The sequence's own keys and values are copied once into
    a buffer with space for the longest group behind them. Each group in turn is written into that
    space, and its rows attend to [own | group]; rows of no group attend to [own]. Groups without
    a row or a key are skipped; with no group left this is one call, bit-equal to diffusers. Extra
    memory: the buffer.

    No row may be in two groups, or twice in one. This is checked on a CPU only, because the check
    would synchronize a GPU; there, shared rows leave other rows without a result.

    Returns out_BSHD.

    Raises:
        LayoutError: if the sequence does not fit `layout`, or groups share rows.
    Source: BachVid (arXiv 2510.21696v1), Sec. 3.5, Eq. (12)-(14).
    """
    num_rows = qkv.query_BSHD.shape[1]
    if num_rows != layout.joint_tokens:
        raise LayoutError(
            f"attention over {num_rows} tokens, but the layout {layout} has "
            f"{layout.joint_tokens}: render with the video size that the layout was made for"
        )
    query_BSHD = rotary.rotate_joint(qkv.query_BSHD, layout)
    groups = _used(groups)
    if not groups:
        return _sdpa(query_BSHD, rotary.rotate_joint(qkv.key_BSHD, layout), qkv.value_BSHD)

    # Groups go behind the own keys, not before: on a CPU both take the same time, since the kernel
    # copies no slice of rows, and this way every call reads from the start of the buffers.
    num_keys = num_rows + max(len(group.positions_M) for group in groups)
    key_BKHD = pad_rows(rotary.rotate_joint(qkv.key_BSHD, layout), num_keys)
    value_BKHD = pad_rows(qkv.value_BSHD, num_keys)
    out_BSHD = torch.empty_like(query_BSHD)

    def attend_rows(rows_Q: Tensor, last: int) -> None:
        out_BQHD = _sdpa(query_BSHD[:, rows_Q], key_BKHD[:, :last], value_BKHD[:, :last])
        out_BSHD.index_copy_(1, rows_Q, out_BQHD)

    other_rows_Q = _other_rows(groups, num_rows)
    if len(other_rows_Q):
        attend_rows(other_rows_Q, num_rows)
    for group in groups:
        # Kernels of one stream run in order: the group before has been read when this is written.
        last = num_rows + len(group.positions_M)
        key_BKHD[:, num_rows:last] = rotary.rotate(group.key_BMHD, group.positions_M)
        value_BKHD[:, num_rows:last] = group.value_BMHD
        attend_rows(group.query_rows_Q, last)
    return out_BSHD


def controlled_attention(
    run: RunContext, control: AttentionControl, layer: int, qkv: QKV
) -> Tensor:
    """Run one layer's attention for all CFG branches of a forward, under `control`.

    `qkv` and the result out_BSC (the attention output before the output projection) hold the rows
    of this rank: all text rows, then its video rows, with padding at the end. Padding is never a
    key, and no method sees it. If no branch has groups, the whole batch is one plain attention
    call, as in diffusers.

    Raises:
        LayoutError: if the batch is no multiple of the number of branches, or the rows do not
            fit the layout.
    """
    num_videos = _videos_of_branch(run, qkv.query_BSHD)
    num_rows = qkv.query_BSHD.shape[1]
    qkv = QKV(*(run.group.to_heads(x_BSHD, run.layout) for x_BSHD in qkv))
    sites = [run.site(layer, branch) for branch in run.branches]
    given = [QKV(*parts) for parts in zip(*(torch.split(x, num_videos) for x in qkv), strict=True)]
    seen = [control.before(site, part) for site, part in zip(sites, given, strict=True)]
    groups = [_used(control.extra(site, part)) for site, part in zip(sites, seen, strict=True)]
    if any(groups):
        parts = zip(seen, groups, strict=True)
        out_BSHD = torch.cat([attend(*part, run.rotary, run.layout) for part in parts])
    else:
        # One call for the batch: a call per branch would be slower and need not be bit-equal.
        if any(new is not old for new, old in zip(seen, given, strict=True)):
            qkv = QKV(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
        out_BSHD = attend(qkv, (), run.rotary, run.layout)
    out_BSHD = _by_branch(control.mix, sites, out_BSHD)
    out_BSC = run.group.to_tokens(out_BSHD, run.layout).flatten(2)
    return pad_rows(_by_branch(control.after, sites, out_BSC), num_rows)


def controlled_cross_attention(
    run: RunContext,
    control: AttentionControl,
    layer: int,
    query_BSHD: Tensor,
    key_BTHD: Tensor,
    value_BTHD: Tensor,
) -> Tensor:
    """Run one layer's attention from video to text for all branches; `control` may watch.

    Queries are the video rows of this rank, padding at the end; no other rank takes part.
    Returns out_BSC, before the output projection.

    Raises:
        LayoutError: if the batch is no multiple of the number of branches.
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


def _by_branch(
    call: Callable[[AttentionSite, Tensor], Tensor], sites: Sequence[AttentionSite], x: Tensor
) -> Tensor:
    """Call a control with the batch rows of each branch. Unchanged rows are not copied."""
    parts = torch.split(x, len(x) // len(sites))
    changed = [call(site, part) for site, part in zip(sites, parts, strict=True)]
    if all(new is old for new, old in zip(changed, parts, strict=True)):
        return x
    return torch.cat(changed)


def _sdpa(query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor) -> Tensor:
    out_BHSD = F.scaled_dot_product_attention(
        query_BSHD.transpose(1, 2), key_BSHD.transpose(1, 2), value_BSHD.transpose(1, 2)
    )
    return out_BHSD.transpose(1, 2)


def _used(groups: Sequence[KVGroup]) -> list[KVGroup]:
    """Return the groups that have a row and a key; the others change nothing."""
    return [group for group in groups if len(group.query_rows_Q) and len(group.positions_M)]


def _other_rows(groups: Sequence[KVGroup], num_rows: int) -> Tensor:
    """Return the rows in no group, ascending. Sorts, because `nonzero` synchronizes a GPU."""
    taken_S = torch.zeros(num_rows, dtype=torch.uint8, device=groups[0].query_rows_Q.device)
    for group in groups:
        taken_S.index_fill_(0, group.query_rows_Q, 1)
    num_taken = sum(len(group.query_rows_Q) for group in groups)
    if num_taken > num_rows or (taken_S.is_cpu and int(taken_S.sum()) < num_taken):
        raise LayoutError(
            f"{len(groups)} key groups of one site have {num_taken} query rows, some of them more "
            f"than once: a row can be in one group only, so give it all its keys there"
        )
    return taken_S.argsort(stable=True)[: num_rows - num_taken]
