"""Matches frame tokens to identity tokens, by the attention outputs of both videos.

Pure functions on tensors. Shape suffixes: see `bachvid.attention.attend`; q is a chunk of Q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bachvid.errors import LayoutError


class TokenMatch(NamedTuple):
    """For each frame token, its identity token (int64) and their cosine (fp32, -1..1)."""

    index_Q: Tensor
    score_Q: Tensor


def match_tokens(
    frame_features: Sequence[Tensor], identity_features: Sequence[Tensor], *, chunk: int = 1024
) -> TokenMatch:
    """Find, for every frame token, its most similar identity token over the whole video.

    Both hold one tensor for each match layer: [Q, C] with the frame tokens to match, and [M, C]
    with all identity tokens. Similarity is the cosine, averaged over the layers in fp32; of
    equals the lowest index wins. Peak memory: 2 * chunk * M * 4 bytes, and one layer in fp32.

    Raises:
        LayoutError: if layers or feature widths differ.
    Source: BachVid (arXiv 2510.21696v1), Sec. 3.3, Eq. (7)-(8).
    Departs: cosine, as in Eq. (5), because raw products favour tokens of large norm.
    """
    shapes = [tuple(x.shape) for x in frame_features], [tuple(x.shape) for x in identity_features]
    if [shape[1] for shape in shapes[0]] != [shape[1] for shape in shapes[1]] or not shapes[0]:
        raise LayoutError(
            f"cannot match frame features {shapes[0]} to identity features {shapes[1]}: need the "
            f"same match layers of the same model, at least one"
        )
    device = frame_features[0].device
    best = []
    for start in range(0, len(frame_features[0]), chunk):
        total_qM = torch.zeros((), device=device)
        for frame_QC, identity_MC in zip(frame_features, identity_features, strict=True):
            frame_qC = F.normalize(frame_QC[start : start + chunk].float(), dim=-1)
            # Normalised again in every chunk: all layers at once would not fit beside a model.
            total_qM = total_qM + frame_qC @ F.normalize(identity_MC.to(device).float(), dim=-1).mT
        best.append((total_qM / len(frame_features)).max(dim=-1))
    if not best:
        empty = torch.empty(0, device=device)
        return TokenMatch(empty.long(), empty)
    return TokenMatch(
        torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])
    )


def match_within_foreground(
    frame_features: Sequence[Tensor],
    identity_features: Sequence[Tensor],
    identity_mask_M: Tensor,
    *,
    sum_frame: Callable[[Tensor], Tensor] = lambda x: x,
) -> TokenMatch:
    """Match frame tokens, all of them foreground, to foreground tokens of the identity video only.

    In each video and layer the mean of the foreground is taken away first: it holds what the
    whole character shares, and with it the parts of a character look alike. Shapes and memory as
    in `match_tokens`; the index is one of all identity tokens. With no foreground in the identity
    video every score is -1. The frame tokens may be some of the video's: `sum_frame` adds what is
    counted of them to what is counted of the others.
    Departs: BachVid (arXiv 2510.21696v1), Eq. (7)-(8), compares with all tokens. A part that looks
    different in both videos, as a hat of another colour, then often matches background.
    """
    identity_rows_P = identity_mask_M.nonzero().flatten()
    if not len(identity_rows_P):
        score_Q = torch.full((len(frame_features[0]),), -1.0, device=frame_features[0].device)
        return TokenMatch(torch.zeros_like(score_Q, dtype=torch.int64), score_Q)
    match = match_tokens(
        [_centre(x_QC, sum_frame) for x_QC in frame_features],
        [_centre(x_MC[identity_rows_P.to(x_MC.device)], lambda x: x) for x_MC in identity_features],
    )
    return TokenMatch(identity_rows_P.to(match.index_Q.device)[match.index_Q], match.score_Q)


def _centre(x_QC: Tensor, add_others: Callable[[Tensor], Tensor]) -> Tensor:
    x_QC = x_QC.float()
    # The count of the rows as one more channel: one sum for both.
    total_C1 = add_others(F.pad(x_QC, (0, 1), value=1.0).sum(dim=0))
    return x_QC - total_C1[:-1] / total_C1[-1]
