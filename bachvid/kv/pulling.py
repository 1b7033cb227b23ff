"""Pulls pieces into a frame video, and checks and stages them layer by layer.

An identity worker packs each step (`bachvid.kv.packing`), some transport carries the blocks to the
frame workers, and each of these reads them one layer ahead of its video (`PulledPieces`). From the
blocks of a gang it joins the branches and heads of its own rank (`bachvid.kv.joining`). Depends on
no method, no model and not on Ray.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from bachvid.errors import CacheMissError, CorruptShardError
from bachvid.kv.cache import SAME_CONFIG, Shard, format_site
from bachvid.kv.joining import BlockJoiner, Layer, StagedLayer, sites_of
from bachvid.kv.packing import PackedStep
from bachvid.layout.gangs import Branch, RankShare, cut_passes
from bachvid.layout.records import AttentionSite, Records

FetchStep = Callable[[int, int], Sequence[PackedStep]]  # (run, place in the reads of the run)

_NUM_SLOTS = 2  # one that is read, one that is filled


class PulledPieces:
    """The source that a frame video reads: a thread pulls packed steps and stages their layers.

    Each layer is copied, one layer ahead of the reader, into one of two slots (pinned if there is
    CUDA), checked there, and handed out from there: nothing ever points into the fetched blocks,
    which other processes may share. A shard is valid until the next layer is requested.
    Memory: two layers, the largest of the run, and one fetched step until its last layer is staged.

    `share` is the part of `records` that this rank reads; `passes` are the forwards of a step, in
    order: the branches that share each. `fetch(run, place)` returns the blocks of all ranks that
    recorded the step at index `place` of the steps announced by `begin`, and waits until all are
    there. Runs are numbered from 0, one for each `begin`. A step that is announced twice has two
    places and is fetched for each. `fetch` is called in the thread, and again for a place with a
    damaged layer. Close the source when the video ends, even if it failed: its thread holds memory.
    After `close`, `fetch` must return or raise.
    """

    def __init__(
        self,
        fetch: FetchStep,
        *,
        share: RankShare,
        records: Records,
        passes: Sequence[Sequence[Branch]],
        config_hash: str,
    ) -> None:
        self._fetch = fetch
        self._share, self._records, self._config_hash = share, records, config_hash
        self._passes = cut_passes(passes, share.branches)
        self._run = -1
        self._ahead: deque[AttentionSite] = deque()
        self._pull: _Pull | None = None
        self._staged: StagedLayer | None = None
        self._num_left = 0  # sites of the staged layer that were not requested yet
        self.wait_seconds = 0.0  # time that `get` waited for layers, over all runs

    def begin(self, steps: Sequence[int]) -> None:
        """Start pulling what the next run reads. Drops what the previous run left unread."""
        self.close()
        self._pull = self._staged = None
        self._run += 1
        run = self._run
        reads = [
            _Read(place, step, layers)
            for place, step in enumerate(steps)
            if (layers := self._layers_read(step))
        ]
        self._ahead = deque(
            site for read in reads for layer in read.layers for site in sites_of(layer)
        )
        if reads:
            joiner = BlockJoiner(
                share=self._share, records=self._records, config_hash=self._config_hash
            )
            self._pull = _Pull(lambda place: self._fetch(run, place), reads, joiner)

    def get(self, site: AttentionSite) -> Shard:
        """Return the next shard; it is valid until another layer's is requested.

        Raises:
            CacheMissError: it is not the next one, or the source is closed.
            CorruptShardError: its bytes are damaged, and were so again when fetched anew.
            Whatever `fetch` raises.
        """
        if self._pull is None or not self._ahead or self._ahead[0] != site:
            following = format_site(self._ahead[0]) if self._ahead else "nothing"
            raise CacheMissError(
                f"the pieces of {format_site(site)} were asked for, {following} is next: they come "
                f"in the order in which they were announced; {SAME_CONFIG}"
            )
        if self._staged is None or not self._num_left:
            self._staged = self._next_layer(self._pull)
            self._num_left = len(sites_of(self._staged.layer))
        self._ahead.popleft()
        self._num_left -= 1
        return self._staged.shard(site)

    def close(self) -> None:
        """End the thread, as soon as a `fetch` in progress returns. Callable from any thread."""
        if self._pull is not None:
            self._pull.stop()

    def _layers_read(self, step: int) -> list[Layer]:
        """Return the layers of a step in the order in which its forwards read them."""
        return [
            tuple(layer)
            for branches in self._passes
            for _, layer in groupby(
                self._records.pieces(step, branches), key=lambda piece: piece[0].layer
            )
        ]

    def _next_layer(self, pull: _Pull) -> StagedLayer:
        """Release the slot of the previous layer, and wait for the next one."""
        if self._staged is not None:
            pull.give_back(self._staged.slot)
            self._staged = None
        start = time.perf_counter()
        try:
            return pull.next_layer()
        finally:
            self.wait_seconds += time.perf_counter() - start


class _Read(NamedTuple):
    """One recorded step at its place in a run's reads, with its layers in reading order."""

    place: int
    step: int
    layers: list[Layer]


class _Pull:
    """The thread of one run: fetches steps, and stages their layers as slots become free."""

    def __init__(
        self,
        fetch: Callable[[int], Sequence[PackedStep]],
        reads: Sequence[_Read],
        joiner: BlockJoiner,
    ) -> None:
        self._fetch, self._reads, self._joiner = fetch, reads, joiner
        self._free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        for _ in range(_NUM_SLOTS):
            self._free.put(None)  # made when the first step says how large its pieces are
        self._ready: queue.SimpleQueue[StagedLayer | BaseException] = queue.SimpleQueue()
        self._stopped = threading.Event()
        threading.Thread(target=self._work, name="bachvid-pull", daemon=True).start()

    def next_layer(self) -> StagedLayer:
        """Wait for the next layer. Raises any error of the thread."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # for the next caller: the thread has ended
            raise item
        return item

    def give_back(self, slot: Tensor) -> None:
        """Release a slot, for the thread to fill again."""
        self._free.put(slot)

    def stop(self) -> None:
        """End the thread, and wake whoever waits for it."""
        self._stopped.set()
        self._free.put(None)
        self._ready.put(CacheMissError("the identity pieces are closed: render the video again"))

    def _work(self) -> None:
        try:
            for read in self._reads:
                self._stage_step(read)
                if self._stopped.is_set():
                    return
        except BaseException as error:  # raised again where the video is rendered
            self._ready.put(error)

    def _stage_step(self, read: _Read) -> None:
        packs = self._fetch_checked(read)
        for layer in read.layers:
            slot = self._free.get()
            if self._stopped.is_set():
                return
            if slot is None:
                largest = max(len(layer) for read in self._reads for layer in read.layers)
                slot = self._joiner.new_slot(largest)
            staged, damaged = self._joiner.stage(packs, layer, slot)
            if damaged is not None:
                packs = self._fetch_checked(read)
                staged, damaged = self._joiner.stage(packs, layer, slot)
            if damaged is not None:
                raise CorruptShardError(
                    f"the identity pieces of {format_site(damaged)} are damaged, also when "
                    f"fetched again: memory or network changed them on the way; they are dropped, "
                    f"and the identity video is rendered again"
                )
            self._ready.put(staged)

    def _fetch_checked(self, read: _Read) -> Sequence[PackedStep]:
        packs = self._fetch(read.place)
        self._joiner.check(read.step, packs)
        return packs
