"""The order of tokens inside a transformer: [text | video], video in raster order.

Pure arithmetic, no torch: the plan needs it on machines that have no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from bachvid.errors import LayoutError


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Where each token of a joint sequence stands.

    A video token's *position* counts from 0 over (latent frame, grid row, grid column); its *row*
    in the joint sequence is `text_tokens` more. A model whose self-attention holds no text has
    `text_tokens` 0.

    Raises:
        LayoutError: if a size is negative, or the grid is empty.
    """

    text_tokens: int
    latent_frames: int
    grid_height: int
    grid_width: int

    def __post_init__(self) -> None:
        if self.text_tokens < 0 or min(self.grid) < 1:
            raise LayoutError(
                f"token layout has {self.text_tokens} text tokens and the grid {self.grid}: text "
                f"tokens must be at least 0, latent frames, height and width at least 1"
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        """(latent frames, grid rows, grid columns)."""
        return self.latent_frames, self.grid_height, self.grid_width

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.grid_height * self.grid_width

    @property
    def video_tokens(self) -> int:
        """Tokens of the whole video."""
        return self.latent_frames * self.frame_tokens

    @property
    def joint_tokens(self) -> int:
        """Tokens of text and video together."""
        return self.text_tokens + self.video_tokens

    @property
    def text_rows(self) -> slice:
        """Rows of the text in the joint sequence."""
        return slice(0, self.text_tokens)

    @property
    def video_rows(self) -> slice:
        """Rows of the video in the joint sequence."""
        return slice(self.text_tokens, self.joint_tokens)

    def rank_tokens(self, size: int) -> int:
        """Return the number of video rows of each of `size` ranks; the last ones may be padding."""
        return -(-self.video_tokens // size)

    def rank_positions(self, rank: int, size: int) -> slice:
        """Return the video positions of a rank: equal chunks in raster order, the last ones cut."""
        rows = self.rank_tokens(size)
        return slice(min(rank * rows, self.video_tokens), min((rank + 1) * rows, self.video_tokens))
