from __future__ import annotations

import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bachvid.attention.control import AttentionSite
from bachvid.errors import CacheMissError, CorruptShardError, WorkerError
from bachvid.kv.cache import KVShard
from bachvid.kv.packing import PackedStep, StepPacker, sites_of
from bachvid.kv.pulling import PulledKVStore
from bachvid.layout.gangs import BRANCHES, Branch, Gang, RankShare, overlapping_ranks

LAYERS, BOTH = (1, 4, 5, 8), ("uncond", "cond")
SHAPE = (1, 7, 3, 5)  # 105 numbers: the pieces need padding in every dtype
CONFIG = "a" * 64
ALL = RankShare(BOTH, 0, 3)
BATCHED, APART = (("uncond", "cond"),), (("cond",), ("uncond",))  # as CogVideoX, as Wan guides
STEPS = (0, 2, 3)


def shard_of(
    site: AttentionSite, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> KVShard:
    seed = 100 * site.step + 10 * site.layer + BOTH.index(site.branch)
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(SHAPE, generator=generator).to(device, dtype) for _ in range(2))
    return KVShard(site, key, value)


def pack(
    step: int,
    dtype: torch.dtype = torch.float32,
    branches: tuple[Branch, ...] = BOTH,
    packer: StepPacker | None = None,
) -> PackedStep:
    packer = packer or StepPacker(share=ALL, layers=LAYERS, branches=branches, config_hash=CONFIG)
    for site in sites_of(step, LAYERS, branches):
        packer.put(shard_of(site, dtype))
    packed = packer.take(step)
    assert packed is not None
    return packed


def sent(packed: PackedStep) -> PackedStep:
    """Cross a process boundary the way Ray does it: the payload out of band and read-only."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 5000  # the header alone
    return pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])


@contextmanager
def open_store(
    fetch: Callable[[int, int], PackedStep], branches: tuple[Branch, ...] = BOTH
) -> Iterator[PulledKVStore]:
    """Open the store of a gang of one, which reads what a gang of one wrote."""
    with open_share(lambda run, step: [fetch(run, step)], ALL, branches) as store:
        yield store


@contextmanager
def open_share(
    fetch: Callable[[int, int], list[PackedStep]],
    share: RankShare,
    branches: tuple[Branch, ...] = BOTH,
    passes: tuple[tuple[Branch, ...], ...] = BATCHED,
) -> Iterator[PulledKVStore]:
    store = PulledKVStore(
        fetch,
        share=share,
        layers=LAYERS,
        branches=branches,
        passes=passes,
        config_hash=CONFIG,
        nbytes=12,
    )
    try:
        yield store
    finally:
        store.close()


def damage(packed: PackedStep, position: int, change: int) -> PackedStep:
    payload = packed.payload.copy()
    payload[position] ^= change
    return PackedStep(packed.header, payload)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited 5 seconds in vain")


def pull_threads() -> int:
    return sum(thread.name == "bachvid-pull" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    wait_until(lambda: pull_threads() == 0)


@pytest.mark.parametrize("branches", [("cond",), BOTH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_pulled_is_bitwise_what_was_packed(
    dtype: torch.dtype, branches: tuple[Branch, ...]
) -> None:
    packer = StepPacker(share=ALL, layers=LAYERS, branches=branches, config_hash=CONFIG)
    steps = {step: sent(pack(step, dtype, branches, packer)) for step in STEPS}
    with open_store(lambda run, step: steps[step], branches) as store:
        for run_steps in ((2,), STEPS):
            store.begin(run_steps)
            for site in (site for step in run_steps for site in sites_of(step, LAYERS, branches)):
                shard, expected = store.get(site), shard_of(site, dtype)
                assert shard.site == site
                assert shard.key_BMHD.dtype == dtype
                assert torch.equal(shard.key_BMHD, expected.key_BMHD)
                assert torch.equal(shard.value_BMHD, expected.value_BMHD)


def test_a_run_that_reads_nothing_counts_as_a_run() -> None:
    fetched: list[tuple[int, int]] = []

    def fetch(run: int, step: int) -> PackedStep:
        fetched.append((run, step))
        return pack(step)

    with open_store(fetch) as store:
        store.begin(())
        store.begin((2,))
        store.get(AttentionSite(2, 1, "uncond"))
    assert fetched == [(1, 2)]


def test_a_shard_holds_until_the_next_layer_is_asked_for() -> None:
    with open_store(lambda run, step: pack(step)) as store:
        store.begin((0,))
        first = store.get(AttentionSite(0, 1, "uncond"))
        second = store.get(AttentionSite(0, 1, "cond"))
        wait_until(lambda: store._pull is not None and store._pull._ready.qsize() == 1)
        assert torch.equal(first.key_BMHD, shard_of(first.site).key_BMHD)
        assert torch.equal(second.value_BMHD, shard_of(second.site).value_BMHD)


def test_the_thread_is_one_layer_ahead_and_no_more() -> None:
    fetched: list[int] = []

    def fetch(run: int, step: int) -> PackedStep:
        fetched.append(step)
        return pack(step)

    with open_store(fetch) as store:
        store.begin(STEPS)
        pull = store._pull
        assert pull is not None
        wait_until(lambda: pull._ready.qsize() == 2)  # nothing is read yet: both slots are full
        for site in sites_of(0, LAYERS, BOTH)[:4]:
            store.get(site)
        wait_until(lambda: pull._ready.qsize() == 1)
        assert fetched == [0]
        store.get(AttentionSite(0, 5, "uncond"))
        wait_until(lambda: pull._ready.qsize() == 1)
        wait_until(lambda: fetched == [0, 2])  # the first step is staged whole


def test_a_fetched_step_is_let_go_as_soon_as_its_last_layer_is_staged() -> None:
    kept: list[weakref.ref[np.ndarray]] = []

    def fetch(run: int, step: int) -> PackedStep:
        packed = sent(pack(step))
        kept.append(weakref.ref(packed.payload))
        return packed

    with open_store(fetch) as store:
        store.begin((0,))
        for site in sites_of(0, LAYERS, BOTH)[:4]:
            store.get(site)
        assert kept[0]() is not None
        last = store.get(AttentionSite(0, 5, "uncond"))
        wait_until(lambda: kept[0]() is None)
        assert torch.equal(last.key_BMHD, shard_of(last.site).key_BMHD)


def test_writing_into_a_shard_never_reaches_what_was_fetched() -> None:
    packed = pack(0)
    before = packed.payload.copy()
    with open_store(lambda run, step: packed) as store:
        store.begin((0,))
        for site in sites_of(0, LAYERS, BOTH):
            shard = store.get(site)
            shard.key_BMHD.fill_(7)
            shard.value_BMHD.fill_(7)
    assert np.array_equal(packed.payload, before)


def test_sites_come_in_order_and_once() -> None:
    with open_store(lambda run, step: pack(step)) as store:
        with pytest.raises(CacheMissError, match="nothing is next"):
            store.get(AttentionSite(0, 1, "uncond"))
        store.begin((0,))
        with pytest.raises(CacheMissError) as error:
            store.get(AttentionSite(0, 4, "cond"))
        assert str(error.value) == (
            "the keys and values of step 0, layer 4, branch cond were asked for, step 0, layer 1, "
            "branch uncond is next: they come once, in the order in which they were announced; "
            "render the identity video and its frame videos with the same story and config"
        )
        for site in sites_of(0, LAYERS, BOTH):
            store.get(site)
        with pytest.raises(CacheMissError, match="nothing is next"):
            store.get(AttentionSite(0, 1, "uncond"))


def test_a_new_run_drops_what_the_last_one_left_unread() -> None:
    with open_store(lambda run, step: pack(step)) as store:
        store.begin((0, 2))
        store.get(AttentionSite(0, 1, "uncond"))
        store.begin((3,))
        site = AttentionSite(3, 1, "uncond")
        assert torch.equal(store.get(site).key_BMHD, shard_of(site).key_BMHD)
        wait_until(lambda: pull_threads() == 1)


@pytest.mark.parametrize(
    "change", [{"config_hash": "b" * 64}, {"step": 1}, {"sites": sites_of(0, (1, 4, 5, 9), BOTH)}]
)
def test_a_step_of_another_identity_video_is_refused(change: dict[str, object]) -> None:
    packed = pack(0)
    header = type(packed.header)(**{**_fields(packed), **change})
    with open_store(lambda run, step: PackedStep(header, packed.payload)) as store:
        store.begin((0,))
        with pytest.raises(CacheMissError, match="what came as step 0 is step"):
            store.get(AttentionSite(0, 1, "uncond"))


def _fields(packed: PackedStep) -> dict[str, object]:
    return {name: getattr(packed.header, name) for name in type(packed.header).__slots__}


GANGS = [Gang(), Gang(2), Gang(3), Gang(6), Gang(2, cfg=2), Gang(4, cfg=2), Gang(12, cfg=2)]


def written_by(
    gang: Gang, branches: tuple[Branch, ...], dtype: torch.dtype
) -> tuple[dict[AttentionSite, KVShard], list[PackedStep | None]]:
    """Return the shards of all 6 heads of a step, and the block of each rank of a gang."""
    shards = {}
    for site in sites_of(0, LAYERS, branches):
        whole = [shard_of(site._replace(step=half), dtype) for half in range(2)]
        key, value = (
            torch.cat([getattr(shard, name) for shard in whole], dim=2)
            for name in ("key_BMHD", "value_BMHD")
        )
        shards[site] = KVShard(site, key, value)
    blocks = []
    for share in gang.shares(6):
        packer = StepPacker(share=share, layers=LAYERS, branches=branches, config_hash=CONFIG)
        heads = slice(share.first_head, share.last_head)
        for site, shard in shards.items():
            if site.branch in share.branches:
                key, value = shard.key_BMHD[:, :, heads], shard.value_BMHD[:, :, heads]
                packer.put(KVShard(site, key, value))
        blocks.append(packer.take(0))
    return shards, blocks


@pytest.mark.parametrize("passes", [BATCHED, APART])
@pytest.mark.parametrize("branches", [("cond",), BOTH])
@pytest.mark.parametrize("writers", GANGS, ids=str)
@pytest.mark.parametrize("readers", GANGS, ids=str)
def test_every_rank_reads_its_branches_and_heads_whoever_wrote_them(
    readers: Gang,
    writers: Gang,
    branches: tuple[Branch, ...],
    passes: tuple[tuple[Branch, ...], ...],
) -> None:
    shards, blocks = written_by(writers, branches, torch.bfloat16)
    for share in readers.shares(6):
        needed = overlapping_ranks(share, writers.shares(6), branches)
        packs = [sent(packed) for rank in needed if (packed := blocks[rank])]
        assert len(packs) == len(needed)
        read = [
            AttentionSite(0, layer, branch)
            for together in passes
            for layer in LAYERS
            for branch in together
            if branch in branches and branch in share.branches
        ]
        heads = slice(share.first_head, share.last_head)
        in_any_order = packs[::-1]
        with open_share(lambda run, step, p=in_any_order: p, share, branches, passes) as store:
            store.begin((0,))
            for site in read:
                shard = store.get(site)
                assert torch.equal(shard.key_BMHD, shards[site].key_BMHD[:, :, heads])
                assert torch.equal(shard.value_BMHD, shards[site].value_BMHD[:, :, heads])
            with pytest.raises(CacheMissError, match="nothing is next"):
                store.get(AttentionSite(0, 1, "cond"))


@pytest.mark.parametrize("kept", [[0], [0, 1, 1], []], ids=["one lacks", "one twice", "none"])
def test_a_step_that_lacks_heads_or_has_them_twice_is_refused(kept: list[int]) -> None:
    _, blocks = written_by(Gang(2), BRANCHES, torch.float32)
    with open_share(lambda run, step: [blocks[rank] for rank in kept], RankShare(BOTH, 0, 6)) as (
        store
    ):
        store.begin((0,))
        with pytest.raises(CacheMissError, match=r"of step 0, branch uncond, came the heads \["):
            store.get(AttentionSite(0, 1, "uncond"))


@pytest.mark.parametrize("position", [0, 900, 3000])
def test_a_changed_byte_is_found_also_where_some_heads_are_read(position: int) -> None:
    shards, blocks = written_by(Gang(2), BRANCHES, torch.float32)
    whole = [packed for packed in blocks if packed]
    given = [[damage(whole[0], position, 1), whole[1]], whole]
    one_head_of_each = RankShare(BOTH, 2, 2)
    with open_share(lambda run, step: given.pop(0), one_head_of_each) as store:
        store.begin((0,))
        for site in sites_of(0, LAYERS, BRANCHES):
            assert torch.equal(store.get(site).key_BMHD, shards[site].key_BMHD[:, :, 2:4])
    assert not given


@settings(max_examples=60, deadline=None)
@given(data=st.data(), change=st.integers(1, 255), is_repeated=st.booleans())
def test_any_changed_byte_is_found_and_fetched_again(
    data: st.DataObject, change: int, is_repeated: bool
) -> None:
    packed = pack(0)
    position = data.draw(st.integers(0, packed.payload.nbytes - 1))
    bad, fetched = damage(packed, position, change), 0

    def fetch(run: int, step: int) -> PackedStep:
        nonlocal fetched
        fetched += 1
        return bad if fetched == 1 or is_repeated else packed

    sites = sites_of(0, LAYERS, BOTH)
    damaged = sites[position // (packed.payload.nbytes // len(sites))]
    with open_store(fetch) as store:
        store.begin((0,))
        for site in sites:
            if is_repeated and site.layer == damaged.layer:
                with pytest.raises(CorruptShardError) as error:
                    store.get(site)
                assert f"{damaged.layer}, branch {damaged.branch} are damaged" in str(error.value)
                break
            shard = store.get(site)
            assert torch.equal(shard.key_BMHD, shard_of(site).key_BMHD)
            assert torch.equal(shard.value_BMHD, shard_of(site).value_BMHD)
    assert fetched == 2


def test_what_fetch_raises_comes_out_of_get_every_time() -> None:
    def fetch(run: int, step: int) -> PackedStep:
        raise TimeoutError("no step in sight")

    with open_store(fetch) as store:
        store.begin((0,))
        for _ in range(2):
            with pytest.raises(TimeoutError, match="no step in sight"):
                store.get(AttentionSite(0, 1, "uncond"))


def test_close_ends_the_thread_and_whoever_waits() -> None:
    arrived, blocked = threading.Event(), threading.Event()

    def fetch(run: int, step: int) -> PackedStep:
        arrived.set()
        assert blocked.wait(10)  # what the owner of fetch interrupts
        return pack(step)

    failures: list[BaseException] = []

    def read() -> None:
        try:
            store.get(AttentionSite(0, 1, "uncond"))
        except CacheMissError as error:
            failures.append(error)

    with open_store(fetch) as store:
        store.begin((0,))
        assert arrived.wait(10)
        reader = threading.Thread(target=read)
        reader.start()
        store.close()
        reader.join(10)
        assert "closed: render the video again" in str(failures)
        assert pull_threads() == 1
        blocked.set()


def test_close_ends_a_thread_that_waits_for_a_free_slot() -> None:
    with open_store(lambda run, step: pack(step)) as store:
        store.begin(STEPS)
        store.get(AttentionSite(0, 1, "uncond"))
        assert pull_threads() == 1
    wait_until(lambda: pull_threads() == 0)


def test_waiting_is_counted_and_only_waiting() -> None:
    def fetch(run: int, step: int) -> PackedStep:
        time.sleep(0.2)
        return pack(step)

    with open_store(fetch) as store:
        store.begin((0,))
        for site in sites_of(0, LAYERS, BOTH):
            store.get(site)
            time.sleep(0.05)
        assert 0.15 < store.wait_seconds < 0.4


def test_the_two_ends_are_one_way() -> None:
    packer = StepPacker(share=ALL, layers=LAYERS, branches=BOTH, config_hash=CONFIG)
    packer.begin(STEPS)
    with pytest.raises(CacheMissError, match="sent away, step by step"):
        packer.get(AttentionSite(0, 1, "cond"))
    with (
        open_store(lambda run, step: pack(step)) as store,
        pytest.raises(WorkerError, match="only reads keys and values"),
    ):
        store.put(shard_of(AttentionSite(0, 1, "cond")))
    assert store.nbytes == 12


def test_a_packer_counts_every_step_once_and_has_nothing_to_give_twice() -> None:
    packer = StepPacker(share=ALL, layers=LAYERS, branches=BOTH, config_hash=CONFIG)
    assert packer.take(0) is None
    for step in (0, 2, 0):
        packed = pack(step, packer=packer)
    assert packer.take(0) is None
    # 840 bytes of key and value in each piece, and 56 of padding.
    assert packed.payload.nbytes == len(LAYERS) * 2 * 896
    assert packer.nbytes == 2 * packed.payload.nbytes


def test_half_a_step_is_never_packed() -> None:
    packer = StepPacker(share=ALL, layers=LAYERS, branches=BOTH, config_hash=CONFIG)
    packer.put(shard_of(AttentionSite(0, 1, "cond")))
    with pytest.raises(AssertionError, match="not a whole step"):
        packer.take(0)
    with pytest.raises(AssertionError, match="take the step before"):
        packer.put(shard_of(AttentionSite(2, 1, "cond")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_shards_of_a_gpu_go_through_pinned_memory() -> None:
    packer = StepPacker(share=ALL, layers=LAYERS, branches=BOTH, config_hash=CONFIG)
    for site in sites_of(0, LAYERS, BOTH):
        packer.put(shard_of(site, torch.bfloat16, "cuda"))
    packed = packer.take(0)
    assert packed is not None
    with open_store(lambda run, step: packed) as store:
        store.begin((0,))
        for site in sites_of(0, LAYERS, BOTH):
            shard = store.get(site)
            assert shard.key_BMHD.is_pinned()
            assert torch.equal(
                shard.value_BMHD.cuda().cpu(), shard_of(site, torch.bfloat16).value_BMHD
            )
