from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bachvid.attention.control import AttentionSite
from bachvid.errors import CacheMissError, LayoutError
from bachvid.kv.cache import IdentityCache, KVShard, MemoryKVStore
from bachvid.layout.tokens import TokenLayout

LAYOUT = TokenLayout(text_tokens=4, latent_frames=2, grid_height=3, grid_width=5)
CACHE = IdentityCache(
    layout=LAYOUT,
    steps=(0, 1, 2),
    layers=(1, 4),
    branches=("uncond", "cond"),
    foreground_mask_N=torch.zeros(LAYOUT.video_tokens, dtype=torch.bool),
    features={2: torch.zeros(LAYOUT.video_tokens, 6), 3: torch.zeros(LAYOUT.video_tokens, 6)},
    seed=0,
    config_hash="a" * 64,
    store=MemoryKVStore(),
)
WANTED = {
    "steps": (1, 2),
    "layers": (1, 4),
    "branches": ("cond",),
    "match_layers": (2, 3),
    "config_hash": "a" * 64,
}


def shard_at(site: AttentionSite, value: float = 0.0) -> KVShard:
    return KVShard(site, torch.full((1, 30, 2, 8), value), torch.full((1, 30, 2, 8), -value))


def test_a_store_gives_back_what_was_put() -> None:
    store = MemoryKVStore()
    first, second = AttentionSite(0, 1, "cond"), AttentionSite(0, 1, "uncond")
    store.put(shard_at(first, 1.0))
    store.put(shard_at(second, 2.0))
    assert torch.equal(store.get(first).key_BMHD, torch.ones(1, 30, 2, 8))
    assert torch.equal(store.get(second).value_BMHD, -2 * torch.ones(1, 30, 2, 8))
    assert store.get(first).site == first


def test_bytes_are_those_of_keys_and_values() -> None:
    store = MemoryKVStore()
    assert store.nbytes == 0
    store.put(shard_at(AttentionSite(0, 1, "cond")))
    store.put(shard_at(AttentionSite(1, 1, "cond")))
    assert store.nbytes == 2 * 2 * 30 * 2 * 8 * 4


def test_a_shard_of_the_same_site_is_replaced() -> None:
    store, site = MemoryKVStore(), AttentionSite(0, 1, "cond")
    store.put(shard_at(site, 1.0))
    store.put(shard_at(site, 3.0))
    assert store.get(site).key_BMHD.max() == 3.0
    assert store.nbytes == 2 * 30 * 2 * 8 * 4


def test_a_missing_shard_is_named_with_what_is_there_and_the_way_out() -> None:
    store = MemoryKVStore()
    for step in (0, 1):
        store.put(shard_at(AttentionSite(step, 4, "cond")))
    with pytest.raises(CacheMissError) as error:
        store.get(AttentionSite(2, 4, "uncond"))
    assert str(error.value) == (
        "no identity keys and values for step 2, layer 4, branch uncond: the store holds steps "
        "[0, 1], layers [4], branches ['cond']; render the identity video and its frame videos "
        "with the same story and config"
    )
    with pytest.raises(CacheMissError, match="the store holds nothing"):
        MemoryKVStore().get(AttentionSite(2, 4, "uncond"))


def test_a_reader_that_agrees_is_let_in() -> None:
    CACHE.check(LAYOUT, **WANTED)


def test_a_reader_with_another_layout_is_refused() -> None:
    with pytest.raises(LayoutError, match="render both with the same `video` section and model"):
        CACHE.check(replace(LAYOUT, latent_frames=3), **WANTED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": (2, 3, 4)}, "lacks steps [3, 4]: it holds [0, 1, 2]; render the identity"),
        ({"layers": (1, 2)}, "lacks layers [2]: it holds [1, 4]; render the identity"),
        ({"match_layers": (1, 2)}, "lacks match layers [1]: it holds [2, 3]; render the identity"),
        (
            {"config_hash": "b" * 64},
            "recorded under config aaaaaaaaaaaa, the frame video renders under bbbbbbbbbbbb: "
            "their pixels would differ; render the identity",
        ),
    ],
)
def test_a_reader_that_would_miss_something_is_refused(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(CacheMissError) as error:
        CACHE.check(LAYOUT, **{**WANTED, **change})
    assert message in str(error.value)


def test_a_reader_of_a_branch_that_was_not_recorded_is_refused() -> None:
    cache = replace(CACHE, branches=("cond",))
    with pytest.raises(CacheMissError) as error:
        cache.check(LAYOUT, **{**WANTED, "branches": ("uncond", "cond")})
    assert "lacks branches ['uncond']: it holds ['cond']" in str(error.value)
