"""Selects the tokens of a frame video that see identity keys, and the keys that they see.

Pure functions on tensors. Shape suffixes: see `bachvid.attention.attend`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bachvid.attention.control import KVGroup
from bachvid.errors import LayoutError
from bachvid.kv.cache import Shard
from bachvid.layout.tokens import TokenLayout
from bachvid.methods.ops.matching import TokenMatch


@dataclass(frozen=True, slots=True)
class InjectedTokens:
    """The index sets of one frame video, all int64: made once, read at every site.

    `*_rows_Q` are joint rows of the queries, `*_positions_Q` their video positions, which are
    also the positions that their identity keys take; `identity_index_Q` says which identity
    token each foreground token matched.
    """

    foreground_rows_Q: Tensor
    foreground_positions_Q: Tensor
    identity_index_Q: Tensor
    background_rows_Q: Tensor
    background_positions_Q: Tensor


def select_injected_tokens(
    frame_mask_N: Tensor,
    identity_mask_N: Tensor,
    match: TokenMatch | None,
    layout: TokenLayout,
    *,
    threshold: float,
) -> InjectedTokens:
    """Choose the tokens of a frame video that see identity keys.

    Foreground: in the frame's mask, and matched, by at least the cosine `threshold`, to a token
    of the identity's mask. Background: in neither mask. `match` is of the frame's foreground
    tokens in rising order; without it only background is chosen.

    Raises:
        LayoutError: if masks and match do not fit each other.
    Source: BachVid (arXiv 2510.21696v1), Sec. 3.5, Eq. (10)-(11).
    Departs: the paper takes every match; a foreground token that matches identity background, or
    hardly anything, would copy background into the character (CharaConsist, released code).
    """
    positions_Q = frame_mask_N.nonzero().flatten()
    if len(frame_mask_N) != len(identity_mask_N) or len(frame_mask_N) != layout.video_tokens:
        raise LayoutError(
            f"masks of {len(frame_mask_N)} and {len(identity_mask_N)} tokens for a video of "
            f"{layout.video_tokens}: frame and identity video must have the same size"
        )
    identity_mask_N = identity_mask_N.to(frame_mask_N.device)
    if match is None:
        positions_Q = index_Q = positions_Q[:0]
    elif len(match.index_Q) == len(positions_Q):
        accepted_Q = identity_mask_N[match.index_Q] & (match.score_Q >= threshold)
        positions_Q, index_Q = positions_Q[accepted_Q], match.index_Q[accepted_Q]
    else:
        raise LayoutError(
            f"a match of {len(match.index_Q)} tokens for {len(positions_Q)} foreground tokens: "
            f"match the frame's foreground tokens, all of them and no other"
        )
    background_Q = (~(frame_mask_N | identity_mask_N)).nonzero().flatten()
    return InjectedTokens(
        foreground_rows_Q=positions_Q + layout.text_tokens,
        foreground_positions_Q=positions_Q,
        identity_index_Q=index_Q,
        background_rows_Q=background_Q + layout.text_tokens,
        background_positions_Q=background_Q,
    )


def inject_identity_kv(shard: Shard, tokens: InjectedTokens) -> list[KVGroup]:
    """Return the groups of identity keys and values for foreground and background queries.

    Foreground keys are those of the matched identity tokens, moved to the positions of the frame
    tokens; background keys stay where they are. Text queries are in neither group. A group
    without tokens is left out.
    Source: BachVid (arXiv 2510.21696v1), Sec. 3.5, Eq. (11)-(14).
    """
    device = tokens.background_rows_Q.device
    key_BMHD, value_BMHD = shard.pieces["key"].to(device), shard.pieces["value"].to(device)
    sets = (
        (tokens.foreground_rows_Q, tokens.identity_index_Q, tokens.foreground_positions_Q),
        (tokens.background_rows_Q, tokens.background_positions_Q, tokens.background_positions_Q),
    )
    return [
        KVGroup(
            rows_Q,
            torch.index_select(key_BMHD, 1, index_Q),
            torch.index_select(value_BMHD, 1, index_Q),
            positions_Q,
        )
        for rows_Q, index_Q, positions_Q in sets
        if len(rows_Q)
    ]
