"""The rotary table of a video's positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bachvid.errors import LayoutError
from bachvid.layout.tokens import TokenLayout


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotary table of a video: fp32, interleaved pairs, one row per video position.

    Without tables (`Rotary.none()`) the features carry the positions, and `rotate` changes nothing.
    """

    cos_ND: Tensor | None
    sin_ND: Tensor | None

    @classmethod
    def none(cls) -> Rotary:
        """Return the rotary of a model that has no RoPE."""
        return cls(None, None)

    @property
    def is_none(self) -> bool:
        """Whether the model has no RoPE."""
        return self.cos_ND is None

    def rotate(self, x_BSHD: Tensor, positions_S: Tensor | None = None) -> Tensor:
        """Rotate each token to its video position; without `positions_S`, token i to position i.

        Bitwise the same as diffusers' `apply_rotary_emb(use_real_unbind_dim=-1)`: computed in fp32,
        then cast back to the dtype of `x_BSHD`.

        Raises:
            LayoutError: without positions, if the table has another number of rows.
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
        # No copies in fp32: products with the table are fp32 whatever the dtype of `x_BSHD`, and
        # such copies would be the largest part of a forward's memory.
        rotated = x_BSHD * cos_ND[:, None]
        pairs = (*x_BSHD.shape[:-1], x_BSHD.shape[-1] // 2, 2)
        real, imaginary = x_BSHD.view(pairs).unbind(-1)
        rotated_real, rotated_imaginary = rotated.view(pairs).unbind(-1)
        rotated_real -= imaginary * sin_ND[:, None, 0::2]
        rotated_imaginary += real * sin_ND[:, None, 1::2]
        return rotated.to(x_BSHD.dtype)

    def rotate_joint(self, x_BSHD: Tensor, layout: TokenLayout) -> Tensor:
        """Rotate the video rows of a joint sequence; text rows have no position."""
        if self.is_none:
            return x_BSHD
        video_BNHD = self.rotate(x_BSHD[:, layout.video_rows])
        return torch.cat([x_BSHD[:, layout.text_rows], video_BNHD], dim=1)
