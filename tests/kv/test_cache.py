from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from recordings import MIXED, Recording

from bachvid.errors import CacheMissError, LayoutError
from bachvid.kv.cache import IdentityManifest, MemoryPieces, have_same_rows
from bachvid.layout.gangs import BRANCHES
from bachvid.layout.records import AttentionSite, Records, RecordSet
from bachvid.layout.tokens import TokenLayout

LAYOUT = TokenLayout(text_tokens=4, latent_frames=2, grid_height=3, grid_width=5)
HELD = Records((RecordSet(("key", "value"), (1, 4), (0, 1, 2), BRANCHES),))
MANIFEST = IdentityManifest(
    layout=LAYOUT,
    records=HELD,
    foreground_mask_N=torch.zeros(LAYOUT.video_tokens, dtype=torch.bool),
    features={2: torch.zeros(LAYOUT.video_tokens, 6), 3: torch.zeros(LAYOUT.video_tokens, 6)},
    seed=0,
    config_hash="a" * 64,
)
WANTED: dict[str, Any] = {
    "records": Records((RecordSet(("key",), (1, 4), (1, 2), ("cond",)),)),
    "match_layers": (2, 3),
    "config_hash": "a" * 64,
}


def held_with(**changes: Any) -> Records:
    return Records((replace(HELD.sets[0], **changes),))


def test_a_shard_of_the_same_site_is_replaced() -> None:
    pieces, site = MemoryPieces(), AttentionSite(2, 4, "cond")
    for version in (0, 1):
        pieces.put(Recording(MIXED, version=version).shard(site))
    Recording(MIXED, version=1).check(pieces, site)
    assert pieces.nbytes == Recording(MIXED).shard(site).nbytes


def test_what_was_never_recorded_is_named_with_what_is_there_and_the_way_out() -> None:
    pieces = MemoryPieces()
    for step in (2, 0):
        pieces.put(Recording().shard(AttentionSite(step, 4, "cond")))
    with pytest.raises(CacheMissError) as error:
        pieces.get(AttentionSite(3, 4, "uncond"))
    assert str(error.value) == (
        "nothing was recorded at step 3, layer 4, branch uncond: there are steps [0, 2], layers "
        "[4], branches ['cond']; render the identity video and its frame videos with the same "
        "story and config"
    )
    with pytest.raises(CacheMissError, match="there are no shards"):
        MemoryPieces().get(AttentionSite(2, 4, "uncond"))


def test_row_sets_are_the_same_if_their_positions_are() -> None:
    positions_M = torch.tensor([0, 3, 4])
    assert have_same_rows(None, None)
    assert have_same_rows(positions_M, positions_M.clone())
    for other in (None, torch.tensor([0, 3, 5]), torch.tensor([0, 3])):
        assert not have_same_rows(positions_M, other)
        assert not have_same_rows(other, positions_M)


def test_a_reader_that_agrees_is_let_in() -> None:
    MANIFEST.check(LAYOUT, **WANTED)
    MANIFEST.check(LAYOUT, **{**WANTED, "records": HELD})
    MANIFEST.check(LAYOUT, **{**WANTED, "records": Records()})


def test_a_set_without_kinds_or_layers_asks_for_nothing() -> None:
    nothing = Records((held_with(kinds=(), steps=(7,)).sets[0], held_with(layers=()).sets[0]))
    assert (nothing.steps, nothing.layers, nothing.branches, nothing.num_pieces) == ((), (), (), 0)
    MANIFEST.check(LAYOUT, **{**WANTED, "records": nothing})


def test_a_reader_with_another_layout_is_refused() -> None:
    with pytest.raises(LayoutError, match="render both with the same `video` section and model"):
        MANIFEST.check(replace(LAYOUT, latent_frames=3), **WANTED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"records": held_with(steps=(2, 3, 4))},
            "lacks steps [3, 4]: it holds [0, 1, 2]; render the",
        ),
        (
            {"records": held_with(layers=(1, 2))},
            "lacks layers [2]: it holds [1, 4]; render the identity",
        ),
        (
            {"records": held_with(kinds=("key", "out"))},
            "lacks the out of step 0, layer 1, branch cond; render the identity",
        ),
        ({"match_layers": (1, 2)}, "lacks match layers [1]: it holds [2, 3]; render the identity"),
        (
            {"config_hash": "b" * 64},
            "recorded under config aaaaaaaaaaaa, the frame video renders under bbbbbbbbbbbb: "
            "their pixels would differ; render the identity",
        ),
    ],
)
def test_a_reader_that_would_miss_something_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CacheMissError) as error:
        MANIFEST.check(LAYOUT, **{**WANTED, **change})
    assert message in str(error.value)


def test_a_reader_of_a_branch_that_was_not_recorded_is_refused() -> None:
    manifest = replace(MANIFEST, records=held_with(branches=("cond",)))
    with pytest.raises(CacheMissError) as error:
        manifest.check(LAYOUT, **{**WANTED, "records": HELD})
    assert "lacks branches ['uncond']: it holds ['cond']" in str(error.value)
