from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import MIXED, STEPS, Recording, damage, sent, with_header

from bachvid.errors import CacheMissError, CorruptShardError
from bachvid.kv.packing import PackedStep
from bachvid.layout.gangs import Branch, Gang
from bachvid.layout.records import AttentionSite, Records, RecordSet

RECORDING = Recording(rows=(0, 3, 4))  # the layers 1, 4, 5 and 8; keys and values of both branches
FIRST = AttentionSite(0, 1, "uncond")


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


class Blocks:
    """A `fetch` that packs the steps that stand at its places, and notes what it was asked for."""

    def __init__(self, steps: Sequence[int], recording: Recording = RECORDING) -> None:
        self._steps, self._recording = steps, recording
        self.asked: list[tuple[int, int]] = []

    def __call__(self, run: int, place: int) -> list[PackedStep]:
        self.asked.append((run, place))
        return [sent(self._recording.pack(self._steps[place]))]


def test_a_step_that_is_read_again_is_fetched_for_each_of_its_places() -> None:
    steps = (2, 2, 0, 2)
    fetch = Blocks(steps)
    with RECORDING.pulled(fetch) as source:
        for run in range(2):
            source.begin(steps)
            for site in RECORDING.reads(steps):
                RECORDING.check(source, site)
            assert fetch.asked == [(at, place) for at in range(run + 1) for place in range(4)]


@pytest.mark.parametrize("branches", [("cond",), ("uncond", "cond")], ids=str)
def test_a_step_of_one_layer_comes_again_from_its_own_place(branches: tuple[Branch, ...]) -> None:
    records = Records((RecordSet(("query",), (4,), (0,), branches),))
    versions = [Recording(records, version=version) for version in range(3)]
    with versions[0].pulled(lambda run, place: [versions[place].pack(0)]) as source:
        source.begin((0, 0, 0))
        for version in versions:
            for site in records.sites(0):
                version.check(source, site)


def test_a_run_that_reads_nothing_counts_as_a_run() -> None:
    fetch = Blocks((2,))
    with RECORDING.pulled(fetch) as source:
        source.begin(())
        source.begin((2,))
        source.get(AttentionSite(2, 1, "uncond"))
    assert fetch.asked == [(1, 0)]


def test_a_place_of_which_a_rank_reads_nothing_is_not_fetched() -> None:
    recording = Recording(MIXED)
    only_uncond = Gang(2, cfg=2).share(0, 6)
    fetch = Blocks((7, 2, 7), recording)
    with recording.pulled(fetch, only_uncond) as source:
        source.begin((7, 2, 7))
        for site in MIXED.sites(2, ("uncond",)):
            recording.check(source, site)
    assert fetch.asked == [(0, 1)]


def test_a_shard_holds_until_the_next_layer_is_asked_for() -> None:
    with RECORDING.pulled(Blocks((0,))) as source:
        source.begin((0,))
        shards = [source.get(AttentionSite(0, 1, branch)) for branch in ("uncond", "cond")]
        wait_until(lambda: source._pull is not None and source._pull._ready.qsize() == 1)
        for shard in shards:
            for kind, piece in RECORDING.shard(shard.site).pieces.items():
                assert torch.equal(shard.pieces[kind], piece)


def test_the_thread_is_one_layer_ahead_and_no_more() -> None:
    fetch = Blocks(STEPS)
    with RECORDING.pulled(fetch) as source:
        source.begin(STEPS)
        pull = source._pull
        assert pull is not None
        wait_until(lambda: pull._ready.qsize() == 2)  # nothing is read yet: both slots are full
        sites = RECORDING.reads((0,))
        for site in sites[:4]:
            source.get(site)
        wait_until(lambda: pull._ready.qsize() == 1)
        assert fetch.asked == [(0, 0)]
        source.get(sites[4])
        wait_until(lambda: pull._ready.qsize() == 1)
        wait_until(lambda: fetch.asked == [(0, 0), (0, 1)])  # the first step is staged whole


def test_layers_of_any_number_of_pieces_take_turns_in_two_slots_of_the_largest() -> None:
    recording = Recording(MIXED)
    with recording.pulled(Blocks((0, 3), recording)) as source:
        source.begin((0, 3))
        slots = set()
        for site in recording.reads((0, 3)):
            recording.check(source, site)
            assert source._staged is not None
            slots.add((source._staged.slot.data_ptr(), source._staged.slot.shape))
    # Layer 6 of step 3: query, key, value of one branch; key, value, out of the other.
    assert [shape for _, shape in slots] == [torch.Size((6, 896))] * 2


def test_a_fetched_step_is_let_go_as_soon_as_its_last_layer_is_staged() -> None:
    kept: list[weakref.ref[np.ndarray]] = []

    def fetch(run: int, place: int) -> list[PackedStep]:
        packed = sent(RECORDING.pack(0))
        assert packed.header.positions_M is not None
        kept.extend(weakref.ref(array) for array in (packed.payload, packed.header.positions_M))
        return [packed]

    with RECORDING.pulled(fetch) as source:
        source.begin((0,))
        sites = RECORDING.reads((0,))
        for site in sites[:4]:
            source.get(site)
        assert kept[0]() is not None
        last = source.get(sites[4])
        wait_until(lambda: all(ref() is None for ref in kept))
        assert last.positions_M is not None
        assert last.positions_M.tolist() == [0, 3, 4]


def test_writing_into_a_shard_never_reaches_what_was_fetched() -> None:
    packed = RECORDING.pack(0)
    before = packed.payload.copy()
    with RECORDING.pulled(lambda run, place: [packed]) as source:
        source.begin((0,))
        for site in RECORDING.reads((0,)):
            shard = source.get(site)
            assert shard.positions_M is not None
            for tensor in (*shard.pieces.values(), shard.positions_M):
                tensor.fill_(7)
    assert np.array_equal(packed.payload, before)
    assert packed.header.positions_M is not None
    assert packed.header.positions_M.tolist() == [0, 3, 4]


def test_sites_come_in_the_order_that_was_announced() -> None:
    with RECORDING.pulled(Blocks((0,))) as source:
        with pytest.raises(CacheMissError, match="nothing is next"):
            source.get(FIRST)
        source.begin((0,))
        with pytest.raises(CacheMissError) as error:
            source.get(AttentionSite(0, 4, "cond"))
        assert str(error.value) == (
            "the pieces of step 0, layer 4, branch cond were asked for, step 0, layer 1, branch "
            "uncond is next: they come in the order in which they were announced; render the "
            "identity video and its frame videos with the same story and config"
        )
        for site in RECORDING.reads((0,)):
            source.get(site)
        with pytest.raises(CacheMissError, match="nothing is next"):
            source.get(FIRST)


def test_a_new_run_drops_what_the_last_one_left_unread() -> None:
    runs = [(0, 2), (3,)]
    with RECORDING.pulled(lambda run, place: [RECORDING.pack(runs[run][place])]) as source:
        for run in runs:
            source.begin(run)
            RECORDING.check(source, AttentionSite(run[0], 1, "uncond"))
        wait_until(lambda: pull_threads() == 1)


def test_blocks_that_do_not_fit_are_refused_where_they_are_read() -> None:
    blocks = [RECORDING.pack(0), with_header(RECORDING.pack(2), config_hash="b" * 64)]
    with RECORDING.pulled(lambda run, place: [blocks[place]]) as source:
        source.begin((0, 2))
        for site in RECORDING.reads((0,)):
            RECORDING.check(source, site)
        with pytest.raises(CacheMissError, match="what came as step 2 is step 2 under config bbb"):
            source.get(AttentionSite(2, 1, "uncond"))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), change=st.integers(1, 255), is_repeated=st.booleans())
def test_any_changed_byte_is_found_and_fetched_again(
    data: st.DataObject, change: int, is_repeated: bool
) -> None:
    packed = RECORDING.pack(0)
    position = data.draw(st.integers(0, packed.payload.nbytes - 1))
    bad = damage(packed, position, change)
    asked: list[int] = []

    def fetch(run: int, place: int) -> list[PackedStep]:
        asked.append(place)
        is_bad = len(asked) == 2 or (len(asked) == 3 and is_repeated)
        return [bad if is_bad else packed]

    size = packed.payload.nbytes // len(packed.header.pieces)
    damaged, _ = packed.header.pieces[position // size]
    with RECORDING.pulled(fetch) as source:
        source.begin((0, 0))
        reads = RECORDING.reads((0, 0))
        for i, site in enumerate(reads):
            if is_repeated and i >= len(reads) // 2 and site.layer == damaged.layer:
                with pytest.raises(CorruptShardError) as error:
                    source.get(site)
                assert f"{damaged.layer}, branch {damaged.branch} are damaged" in str(error.value)
                break
            RECORDING.check(source, site)
    assert asked == [0, 1, 1]


def test_what_fetch_raises_comes_out_of_get_every_time() -> None:
    def fetch(run: int, place: int) -> list[PackedStep]:
        raise TimeoutError("no step in sight")

    with RECORDING.pulled(fetch) as source:
        source.begin((0,))
        for _ in range(2):
            with pytest.raises(TimeoutError, match="no step in sight"):
                source.get(FIRST)


def test_close_ends_the_thread_and_whoever_waits() -> None:
    arrived, blocked = threading.Event(), threading.Event()

    def fetch(run: int, place: int) -> list[PackedStep]:
        arrived.set()
        assert blocked.wait(10)  # what the owner of fetch interrupts
        return [RECORDING.pack(STEPS[place])]

    failures: list[BaseException] = []

    def read() -> None:
        try:
            source.get(FIRST)
        except CacheMissError as error:
            failures.append(error)

    with RECORDING.pulled(fetch) as source:
        source.begin((0,))
        assert arrived.wait(10)
        reader = threading.Thread(target=read)
        reader.start()
        source.close()
        reader.join(10)
        assert "closed: render the video again" in str(failures)
        assert pull_threads() == 1
        blocked.set()


def test_close_ends_a_thread_that_waits_for_a_free_slot() -> None:
    with RECORDING.pulled(Blocks(STEPS)) as source:
        source.begin(STEPS)
        source.get(FIRST)
        assert pull_threads() == 1
    wait_until(lambda: pull_threads() == 0)


def test_waiting_is_counted_and_only_waiting() -> None:
    def fetch(run: int, place: int) -> list[PackedStep]:
        time.sleep(0.2)
        return [RECORDING.pack(STEPS[place])]

    with RECORDING.pulled(fetch) as source:
        source.begin((0,))
        for site in RECORDING.reads((0,)):
            source.get(site)
            time.sleep(0.05)
        assert 0.15 < source.wait_seconds < 0.4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_shards_of_a_gpu_go_through_pinned_memory() -> None:
    recording = Recording(MIXED, torch.bfloat16, (0, 3, 4), device="cuda")
    packed = recording.pack(3)
    with recording.pulled(lambda run, place: [packed]) as source:
        source.begin((3, 3))
        for site in recording.reads((3,)):
            assert all(piece.is_pinned() for piece in source.get(site).pieces.values())
        for site in recording.reads((3,)):
            recording.check(source, site)
