from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bachvid.attention.control import AttentionSite
from bachvid.errors import CacheMissError, CorruptShardError, WorkerError
from bachvid.kv.cache import IdentityCache, KVShard
from bachvid.kv.files import FileKVStore
from bachvid.kv.packing import sites_of
from bachvid.layout.tokens import TokenLayout

LAYOUT = TokenLayout(text_tokens=2, latent_frames=2, grid_height=2, grid_width=3)
LAYERS, BOTH, STEPS = (1, 4), ("uncond", "cond"), (0, 2)
CONFIG = "a" * 64


def shard_of(site: AttentionSite, dtype: torch.dtype = torch.float32, base: int = 0) -> KVShard:
    generator = torch.Generator().manual_seed(base + 10 * site.step + site.layer)
    shape = (1, LAYOUT.video_tokens, 3, 5)
    key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return KVShard(site, key, -value if site.branch == "cond" else value)


def new_store(directory: Path, config_hash: str = CONFIG) -> FileKVStore:
    return FileKVStore(directory, layers=LAYERS, branches=BOTH, config_hash=config_hash)


def put_step(
    store: FileKVStore, step: int, dtype: torch.dtype = torch.float32, base: int = 0
) -> None:
    for site in sites_of(step, LAYERS, BOTH):
        store.put(shard_of(site, dtype, base))


def save_cache(directory: Path, dtype: torch.dtype = torch.float32) -> IdentityCache:
    store = new_store(directory)
    for step in STEPS:
        put_step(store, step, dtype)
    generator = torch.Generator().manual_seed(5)
    cache = IdentityCache(
        layout=LAYOUT,
        steps=STEPS,
        layers=LAYERS,
        branches=BOTH,
        foreground_mask_N=torch.arange(LAYOUT.video_tokens) % 3 == 0,
        features={
            layer: torch.randn(LAYOUT.video_tokens, 7, generator=generator).to(dtype)
            for layer in (9, 3)
        },
        seed=17,
        config_hash=CONFIG,
        store=store,
    )
    return store.save(cache)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    save_cache(directory)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved cache, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "cache"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_loaded_is_bitwise_what_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = save_cache(tmp_path, dtype)
    loaded = FileKVStore.load(tmp_path)
    for field in fields(IdentityCache):
        if field.name not in ("foreground_mask_N", "features", "store"):
            assert getattr(loaded, field.name) == getattr(saved, field.name)
    assert torch.equal(loaded.foreground_mask_N, saved.foreground_mask_N)
    assert loaded.foreground_mask_N.dtype == torch.bool
    assert list(loaded.features) == [9, 3]
    for layer in (9, 3):
        assert loaded.features[layer].dtype == dtype
        assert torch.equal(loaded.features[layer], saved.features[layer])
    for site in (site for step in STEPS for site in sites_of(step, LAYERS, BOTH)):
        for store in (loaded.store, saved.store):
            shard, expected = store.get(site), shard_of(site, dtype)
            assert shard.site == site
            assert torch.equal(shard.key_BMHD, expected.key_BMHD)
            assert torch.equal(shard.value_BMHD, expected.value_BMHD)
            assert shard.key_BMHD.dtype == dtype


def test_a_loaded_cache_lets_its_reader_in(directory: Path) -> None:
    FileKVStore.load(directory).check(
        LAYOUT, steps=STEPS, layers=LAYERS, branches=BOTH, match_layers=(3,), config_hash=CONFIG
    )


def test_bytes_are_those_of_keys_and_values(directory: Path) -> None:
    assert new_store(directory / "empty").nbytes == 0
    assert FileKVStore.load(directory).store.nbytes == 2 * 4 * 2 * (12 * 3 * 5 * 4)


def test_writing_into_a_shard_never_reaches_the_file(directory: Path) -> None:
    store, site = FileKVStore.load(directory).store, AttentionSite(0, 1, "cond")
    store.get(site).key_BMHD.fill_(7)
    assert torch.equal(store.get(site).key_BMHD, shard_of(site).key_BMHD)


def test_a_step_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    *first, last = sites_of(0, LAYERS, BOTH)
    for site in first:
        store.put(shard_of(site))
    with pytest.raises(CacheMissError, match=r"there is no .*step-000.safetensors: render the"):
        store.get(first[0])
    assert list(tmp_path.iterdir()) == []
    store.put(shard_of(last))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000.safetensors"]
    assert not store._pending  # else every step would stay in memory
    assert torch.equal(store.get(first[0]).key_BMHD, shard_of(first[0]).key_BMHD)


def test_a_step_that_is_put_again_replaces_the_first(directory: Path) -> None:
    store, site = new_store(directory), AttentionSite(2, 4, "uncond")
    put_step(store, 2, base=1000)
    assert torch.equal(store.get(site).key_BMHD, shard_of(site, base=1000).key_BMHD)


def test_a_cache_is_saved_only_when_its_steps_are_there(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    put_step(store, 0)
    cache = IdentityCache(
        LAYOUT, (0, 2), LAYERS, BOTH, torch.zeros(12, dtype=torch.bool), {}, 0, CONFIG, store
    )
    with pytest.raises(CacheMissError, match=r"lacks the files of steps \[2\]: render its"):
        store.save(cache)
    with pytest.raises(CacheMissError, match=r"there is no .*manifest.safetensors: render"):
        FileKVStore.load(tmp_path)
    store.save(replace(cache, steps=(0,)))
    assert FileKVStore.load(tmp_path).steps == (0,)


def test_a_cache_that_lost_a_step_is_refused(directory: Path) -> None:
    (directory / "step-002.safetensors").unlink()
    with pytest.raises(CacheMissError, match=r"lacks the files of steps \[2\]: render its"):
        FileKVStore.load(directory)


def test_a_site_that_was_not_recorded_is_a_miss(directory: Path) -> None:
    store = FileKVStore.load(directory).store
    with pytest.raises(CacheMissError, match=r"has no layer 2, branch cond: it holds layers \[1,"):
        store.get(AttentionSite(0, 2, "cond"))
    with pytest.raises(CacheMissError, match=r"there is no .*step-001"):
        store.get(AttentionSite(1, 1, "cond"))


def test_a_step_of_another_config_or_place_is_refused(directory: Path) -> None:
    site = AttentionSite(0, 1, "cond")
    with pytest.raises(CacheMissError, match="under config aaaaaaaaaaaa, wanted is step 0 under b"):
        new_store(directory, "b" * 64).get(site)
    (directory / "step-002.safetensors").replace(directory / "step-000.safetensors")
    with pytest.raises(CacheMissError, match="is of step 2 under config"):
        new_store(directory).get(site)


@pytest.mark.parametrize("name", ["step-000.safetensors", "manifest.safetensors"])
@pytest.mark.parametrize("num_bytes", [0, 4, 300, -1])
def test_a_file_that_is_cut_short_is_refused(directory: Path, name: str, num_bytes: int) -> None:
    path = directory / name
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CorruptShardError, match=r"is damaged: .* delete it and render the"):
        FileKVStore.load(directory).store.get(AttentionSite(0, 1, "cond"))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("step-000", '"dtype":"F32"', '"dtype":"I32"'),
        ("step-000", "[1,12,3,5]", "[1,12,5,3]"),
        ("step-000", '"header"', '"heeder"'),
        ("step-000", "1.cond.key", "2.cond.key"),
        ("manifest", '\\"seed\\": 17', '\\"seed\\": 18'),
    ],
)
def test_a_header_that_was_changed_is_refused(
    directory: Path, name: str, old: str, new: str
) -> None:
    path = directory / f"{name}.safetensors"
    data = path.read_bytes()
    assert old.encode() in data
    path.write_bytes(data.replace(old.encode(), new.encode()))
    with pytest.raises(CorruptShardError, match="is damaged"):
        FileKVStore.load(directory).store.get(AttentionSite(0, 1, "cond"))


def test_a_file_of_somebody_else_is_refused(directory: Path) -> None:
    save_file({"x": torch.zeros(1)}, directory / "manifest.safetensors")
    with pytest.raises(CorruptShardError, match="is damaged"):
        FileKVStore.load(directory)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["step-000.safetensors", "manifest.safetensors"]),
    position=st.floats(0, 1, exclude_max=True),
    change=st.integers(1, 255),
)
def test_no_changed_byte_changes_what_is_read(
    saved: Path, directory: Path, name: str, position: float, change: int
) -> None:
    data = bytearray((saved / name).read_bytes())
    data[int(position * len(data))] ^= change
    (directory / name).write_bytes(data)
    expected = FileKVStore.load(saved)
    try:
        cache = FileKVStore.load(directory)
        shards = [cache.store.get(site) for site in sites_of(0, LAYERS, BOTH)]
    except CacheMissError:
        return
    facts = (
        cache.layout,
        cache.steps,
        cache.layers,
        cache.branches,
        cache.seed,
        list(cache.features),
    )
    assert facts == (LAYOUT, STEPS, LAYERS, BOTH, 17, [9, 3])
    assert torch.equal(cache.foreground_mask_N, expected.foreground_mask_N)
    for layer, x in expected.features.items():
        assert torch.equal(cache.features[layer], x)
    for shard in shards:
        assert torch.equal(shard.key_BMHD, shard_of(shard.site).key_BMHD)
        assert torch.equal(shard.value_BMHD, shard_of(shard.site).value_BMHD)


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkerError, match=r"cannot write .* set cache.directory to another place"):
        put_step(new_store(tmp_path / "file"), 0)
