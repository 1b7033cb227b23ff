from __future__ import annotations

import pytest

from bachvid.errors import LayoutError
from bachvid.layout.tokens import TokenLayout


def test_cogvideox_5b_has_the_token_counts_of_the_paper() -> None:
    layout = TokenLayout(text_tokens=226, latent_frames=13, grid_height=30, grid_width=45)
    assert (layout.frame_tokens, layout.video_tokens, layout.joint_tokens) == (1350, 17550, 17776)


def test_text_and_video_rows_part_the_joint_sequence() -> None:
    layout = TokenLayout(text_tokens=3, latent_frames=2, grid_height=2, grid_width=1)
    rows = list(range(layout.joint_tokens))
    assert rows[layout.text_rows] == [0, 1, 2]
    assert rows[layout.video_rows] == [3, 4, 5, 6]


def test_a_model_without_text_in_its_attention_has_no_text_rows() -> None:
    layout = TokenLayout(text_tokens=0, latent_frames=1, grid_height=2, grid_width=2)
    rows = list(range(layout.joint_tokens))
    assert rows[layout.text_rows] == []
    assert rows[layout.video_rows] == rows


@pytest.mark.parametrize("sizes", [(-1, 1, 1, 1), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)])
def test_an_empty_grid_is_refused(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(LayoutError, match="must be at least 0, latent frames"):
        TokenLayout(*sizes)


@pytest.mark.parametrize("size", range(1, 9))
def test_ranks_have_equal_chunks_that_make_up_the_video(size: int) -> None:
    layout = TokenLayout(text_tokens=3, latent_frames=2, grid_height=1, grid_width=5)
    chunks = [layout.rank_positions(rank, size) for rank in range(size)]
    positions = list(range(10))
    assert [i for chunk in chunks for i in positions[chunk]] == positions
    assert max(chunk.stop - chunk.start for chunk in chunks) == layout.rank_tokens(size)
    assert all(
        len(positions[chunk]) == layout.rank_tokens(size)
        for chunk in chunks[: 10 // -(-10 // size)]
    )
