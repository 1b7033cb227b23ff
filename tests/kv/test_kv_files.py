from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import CONFIG, KEYS_AND_VALUES, MIXED, STEPS, Recording
from safetensors import safe_open
from safetensors.torch import save_file

from bachvid.errors import CacheMissError, CorruptShardError, WorkerError
from bachvid.kv.cache import IdentityManifest
from bachvid.kv.files import FilePieces, read_manifest, write_manifest
from bachvid.layout.records import AttentionSite, Records
from bachvid.layout.tokens import TokenLayout

LAYOUT = TokenLayout(text_tokens=2, latent_frames=1, grid_height=1, grid_width=7)
RECORDING = Recording(MIXED, rows=(0, 3, 4))
SITE = AttentionSite(2, 4, "cond")
EMPTY = IdentityManifest(LAYOUT, MIXED, None, {}, seed=0, config_hash=CONFIG)


def pieces_at(directory: Path, records: Records = MIXED, config_hash: str = CONFIG) -> FilePieces:
    return FilePieces(directory, records=records, config_hash=config_hash)


def manifest_of(dtype: torch.dtype) -> IdentityManifest:
    generator = torch.Generator().manual_seed(5)
    return IdentityManifest(
        layout=LAYOUT,
        records=MIXED,
        foreground_mask_N=torch.arange(LAYOUT.video_tokens) % 3 == 0,
        features={
            layer: torch.randn(LAYOUT.video_tokens, 7, generator=generator).to(dtype)
            for layer in (9, 3)
        },
        seed=17,
        config_hash=CONFIG,
    )


def check_manifest(given: IdentityManifest, expected: IdentityManifest) -> None:
    for field in fields(IdentityManifest):
        if field.name not in ("foreground_mask_N", "features"):
            assert getattr(given, field.name) == getattr(expected, field.name)
    assert given.foreground_mask_N is not None
    assert expected.foreground_mask_N is not None
    assert given.foreground_mask_N.dtype == torch.bool
    assert torch.equal(given.foreground_mask_N, expected.foreground_mask_N)
    assert list(given.features) == list(expected.features)
    for layer, x_NC in expected.features.items():
        assert given.features[layer].dtype == x_NC.dtype
        assert torch.equal(given.features[layer], x_NC)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    pieces = pieces_at(directory)
    for step in STEPS:
        RECORDING.put(pieces, step)
    write_manifest(directory, manifest_of(torch.float32))
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved cache, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "cache"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_manifest_comes_back_as_it_was_written(directory: Path, dtype: torch.dtype) -> None:
    write_manifest(directory, manifest_of(dtype))
    check_manifest(read_manifest(directory), manifest_of(dtype))
    read_manifest(directory).check(LAYOUT, records=MIXED, match_layers=(3,), config_hash=CONFIG)


def test_a_manifest_without_mask_and_features_comes_back(directory: Path) -> None:
    write_manifest(directory, EMPTY)
    assert read_manifest(directory) == EMPTY


def test_a_cache_without_pieces_comes_back(tmp_path: Path) -> None:
    write_manifest(tmp_path, replace(EMPTY, records=Records()))
    assert read_manifest(tmp_path).records == Records()


def test_a_file_names_its_tensors_by_layer_branch_and_kind(saved: Path) -> None:
    names = {f"{site.layer}.{site.branch}.{kind}" for site, kind in MIXED.pieces(3)}
    with safe_open(saved / "step-003.safetensors", framework="pt") as file:
        assert set(file.keys()) == names | {"positions"}
        assert file.get_tensor("4.cond.out").shape == (1, 3, 6, 5)
    assert {"0.cond.query", "6.uncond.query", "6.uncond.value"} < names


def test_writing_into_a_shard_never_reaches_the_file(directory: Path) -> None:
    pieces = pieces_at(directory)
    pieces.get(SITE).pieces["out"].fill_(7)
    RECORDING.check(pieces, SITE)


def test_a_step_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    pieces = pieces_at(tmp_path)
    *first, last = MIXED.sites(2)
    for site in first:
        pieces.put(RECORDING.shard(site))
    with pytest.raises(CacheMissError, match=r"there is no .*step-002.safetensors: render the"):
        pieces.get(first[0])
    assert list(tmp_path.iterdir()) == []
    pieces.put(RECORDING.shard(last))
    assert [path.name for path in tmp_path.iterdir()] == ["step-002.safetensors"]
    assert not pieces._pending  # else every step would stay in memory
    RECORDING.check(pieces, first[0])


def test_a_step_that_is_put_again_replaces_the_first(directory: Path) -> None:
    pieces, again = pieces_at(directory), replace(RECORDING, version=1)
    for _ in range(2):
        again.put(pieces, 2)
    again.check(pieces, SITE)
    assert pieces.nbytes == len(MIXED.pieces(2)) * 3 * 6 * 5 * 4


def test_only_what_is_recorded_is_put_and_of_one_row_set(tmp_path: Path) -> None:
    pieces = pieces_at(tmp_path)
    with pytest.raises(AssertionError, match="other kinds than recorded"):
        pieces.put(Recording(KEYS_AND_VALUES).shard(SITE))
    first, *others, last = MIXED.sites(2)
    pieces.put(replace(RECORDING, rows=(0, 3, 5)).shard(first))
    for site in others:
        pieces.put(RECORDING.shard(site))
    with pytest.raises(AssertionError, match="the row set is a fixed one"):
        pieces.put(RECORDING.shard(last))


def test_a_cache_is_completed_only_when_its_steps_are_there(tmp_path: Path) -> None:
    RECORDING.put(pieces_at(tmp_path), 0)
    with pytest.raises(CacheMissError, match=r"lacks the files of steps \[2, 3\]: render its"):
        write_manifest(tmp_path, EMPTY)
    with pytest.raises(CacheMissError, match=r"there is no .*manifest.safetensors: render"):
        read_manifest(tmp_path)


def test_a_cache_that_lost_a_step_is_refused(directory: Path) -> None:
    (directory / "step-002.safetensors").unlink()
    with pytest.raises(CacheMissError, match=r"lacks the files of steps \[2\]: render its"):
        read_manifest(directory)


def test_a_site_that_was_not_recorded_is_a_miss(directory: Path) -> None:
    pieces = pieces_at(directory)
    with pytest.raises(CacheMissError, match="nothing is recorded at step 2, layer 5, branch cond"):
        pieces.get(AttentionSite(2, 5, "cond"))
    with pytest.raises(CacheMissError, match="nothing is recorded at step 1, layer 4, branch cond"):
        pieces.get(AttentionSite(1, 4, "cond"))
    other = pieces_at(directory, KEYS_AND_VALUES)
    with pytest.raises(CacheMissError, match=r"lacks the pieces \['8.cond.key', '8.cond.value'\]"):
        other.get(AttentionSite(2, 8, "cond"))


def test_a_step_of_another_config_or_place_is_refused(directory: Path) -> None:
    with pytest.raises(CacheMissError, match="under config aaaaaaaaaaaa, wanted is step 2 under b"):
        pieces_at(directory, config_hash="b" * 64).get(SITE)
    (directory / "step-003.safetensors").replace(directory / "step-002.safetensors")
    with pytest.raises(CacheMissError, match="is of step 3 under config"):
        pieces_at(directory).get(SITE)


@pytest.mark.parametrize("name", ["step-002.safetensors", "manifest.safetensors"])
@pytest.mark.parametrize("num_bytes", [0, 4, 300, -1])
def test_a_file_that_is_cut_short_is_refused(directory: Path, name: str, num_bytes: int) -> None:
    path = directory / name
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CorruptShardError, match=r"is damaged: .* delete it and render the"):
        open_and_get(directory)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("step-002", '"dtype":"F32"', '"dtype":"I32"'),
        ("step-002", "[1,3,6,5]", "[1,3,5,6]"),
        ("step-002", '"header"', '"heeder"'),
        ("step-002", '"4.cond.key"', '"5.cond.key"'),
        ("step-002", '"positions"', '"position_"'),
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
        open_and_get(directory)


@pytest.mark.parametrize(("old", "new"), [("key", "value"), ("value", "out")])
def test_a_swapped_kind_is_found(directory: Path, old: str, new: str) -> None:
    path = directory / "step-002.safetensors"
    first, second = f'"4.cond.{old}":{{'.encode(), f'"4.cond.{new}":{{'.encode()
    data = path.read_bytes()
    assert data.count(first) == data.count(second) == 1
    swapped = (
        data.replace(first, b"<the first>").replace(second, first).replace(b"<the first>", second)
    )
    assert len(swapped) == len(data)
    path.write_bytes(swapped)
    with pytest.raises(CorruptShardError, match=r"its tensor 4.cond.\w+ was changed"):
        open_and_get(directory)


def test_a_swapped_row_set_is_found(directory: Path) -> None:
    path, positions = directory / "step-002.safetensors", torch.tensor([0, 3, 4])
    data, rows = path.read_bytes(), positions.numpy().tobytes()
    assert data.count(rows) == 1
    path.write_bytes(data.replace(rows, (positions + 1).numpy().tobytes()))
    with pytest.raises(CorruptShardError, match="its tensor positions was changed"):
        open_and_get(directory)


def test_a_file_of_somebody_else_is_refused(directory: Path) -> None:
    save_file({"x": torch.zeros(1)}, directory / "manifest.safetensors")
    with pytest.raises(CorruptShardError, match="is damaged"):
        read_manifest(directory)


def open_and_get(directory: Path) -> None:
    manifest = read_manifest(directory)
    pieces_at(directory, manifest.records, manifest.config_hash).get(SITE)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["step-002.safetensors", "manifest.safetensors"]),
    position=st.floats(0, 1, exclude_max=True),
    change=st.integers(1, 255),
)
def test_no_changed_byte_changes_what_is_read(
    saved: Path, directory: Path, name: str, position: float, change: int
) -> None:
    whole = (saved / name).read_bytes()
    data = bytearray(whole)
    data[int(position * len(data))] ^= change
    (directory / name).write_bytes(data)
    try:
        manifest, pieces = read_manifest(directory), pieces_at(directory)
        for site in MIXED.sites(2):
            RECORDING.check(pieces, site)
    except CacheMissError:
        return
    finally:
        (directory / name).write_bytes(whole)
    check_manifest(manifest, manifest_of(torch.float32))


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkerError, match=r"cannot write .* set cache.directory to another place"):
        RECORDING.put(pieces_at(tmp_path / "file"), 0)
    with pytest.raises(WorkerError, match=r"cannot write .* set cache.directory to another place"):
        write_manifest(tmp_path / "file", replace(EMPTY, records=Records()))
