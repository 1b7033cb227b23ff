"""Foreground masks from the attention that video tokens pay to the segments of the prompt.

Pure functions on tensors. Shape suffixes: see `bachvid.attention.control`; n is a chunk of N, K the
keys of a softmax, G segments of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bachvid.errors import WorkerError
from bachvid.layout.tokens import TokenLayout

# An empty or full mask is taken again above this quantile of its score: characters of the paper's
# stories cover 15 to 30 percent of the tokens.
RECOVERY_QUANTILE = 0.8

# Logits of one head at a time, at most: with more, the mask step would need more memory than any
# other step of a video.
_MOST_LOGITS = 2**20


@dataclass(frozen=True, slots=True)
class MaskRecovery:
    """What was done about a mask that was empty or full; for the manifest.

    `threshold` is the score above which a token became foreground; None if none did.
    """

    step: int
    found: Literal["empty", "full"]
    remedy: Literal["quantile", "background_only"]
    threshold: float | None


@dataclass(frozen=True, slots=True)
class ForegroundMask:
    """`mask_N` is bool, True is character; `score_N` is fp32, foreground less background mass."""

    mask_N: Tensor
    score_N: Tensor
    recovery: MaskRecovery | None


def text_mass(
    query_NHD: Tensor,
    key_KHD: Tensor,
    segments: Sequence[Sequence[int]],
    *,
    chunk: int = 256,
) -> Tensor:
    """Return the attention that each query pays to a key of each segment, on average.

    The softmax runs over all of `key_KHD`; `segments` are rows of it. Queries and keys are as
    the attention sees them: after RoPE. Returns mass_NG, fp32, the mean over heads and over the
    keys of a segment. Peak memory: 2 * heads * chunk * K * 4 bytes; with many keys a
    chunk is smaller.
    Source: BachVid (arXiv 2510.21696v1), Sec. 3.2, Eq. (1)-(3).
    """
    key_HDK = key_KHD.float().permute(1, 2, 0)
    scale = query_NHD.shape[-1] ** -0.5
    rows = [torch.tensor(segment, device=key_KHD.device) for segment in segments]
    parts = []
    for query_nHD in torch.split(query_NHD, min(chunk, max(_MOST_LOGITS // len(key_KHD), 1))):
        logits_HnK = (query_nHD.float() * scale).transpose(0, 1) @ key_HDK
        log_sum_Hn1 = logits_HnK.logsumexp(dim=-1, keepdim=True)
        masses = [(logits_HnK[..., row] - log_sum_Hn1).exp().mean(dim=(0, 2)) for row in rows]
        parts.append(torch.stack(masses, dim=-1))
    return torch.cat(parts)


def extract_foreground_mask(
    masses: Sequence[Tensor],
    layout: TokenLayout,
    *,
    step: int,
    morphology: bool,
    on_empty: Literal["adapt", "fail"],
) -> ForegroundMask:
    """Compare character with background mass, summed over the layers of `masses`.

    Each of `masses` is [N, 2]: background, character. A mask that is empty or full helps no
    injection: under "adapt" it is taken again from the highest scores, without morphology; if
    the scores are all alike, no token is foreground, which leaves the background injection.

    Raises:
        WorkerError: if the mask is empty or full under "fail".
    Source: BachVid (arXiv 2510.21696v1), Sec. 3.2, Eq. (4).
    Departs: the paper counts an empty mask as a failed story.
    """
    background_N, character_N = torch.stack(list(masses)).sum(dim=0).unbind(dim=-1)
    score_N = character_N - background_N
    mask_N = background_N <= character_N
    if morphology:
        mask_N = smooth_mask(mask_N, layout)
    if not _is_degenerate(mask_N):
        return ForegroundMask(mask_N, score_N, None)
    found: Literal["empty", "full"] = "full" if bool(mask_N.all()) else "empty"
    if on_empty == "fail":
        raise WorkerError(
            f"the foreground mask at step {step} is {found}: a story needs a character and a "
            f"background; reword the prompt, or set method.on_empty_mask=adapt"
        )
    threshold = score_N.quantile(RECOVERY_QUANTILE)
    mask_N = score_N >= threshold
    if not _is_degenerate(mask_N):
        recovery = MaskRecovery(step, found, "quantile", float(threshold))
        return ForegroundMask(mask_N, score_N, recovery)
    recovery = MaskRecovery(step, found, "background_only", None)
    return ForegroundMask(torch.zeros_like(mask_N), score_N, recovery)


def smooth_mask(mask_N: Tensor, layout: TokenLayout) -> Tensor:
    """Erode by 3x3, then dilate by 5x5, in each latent frame; borders as in OpenCV.

    Source: CharaConsist (arXiv 2507.11533), released code. BachVid does not speak of it.
    """
    mask_FHW = mask_N.view(layout.grid).float()
    # Max-pooling pads with -inf: what lies outside neither erodes nor dilates.
    eroded_FHW = -F.max_pool2d(-mask_FHW, kernel_size=3, stride=1, padding=1)
    dilated_FHW = F.max_pool2d(eroded_FHW, kernel_size=5, stride=1, padding=2)
    return dilated_FHW.flatten() > 0.5


def _is_degenerate(mask_N: Tensor) -> bool:
    return int(mask_N.sum()) in (0, len(mask_N))
