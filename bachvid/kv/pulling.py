"""Keys and values on their way into a frame video: pulled, checked and staged layer by layer.

An identity worker packs each step (`bachvid.kv.packing`), whatever carries it gives the blocks to
the frame workers, and each of them reads them one layer ahead of its video (`PulledKVStore`). Of
the blocks of a gang it joins the branches and heads of its own rank. Knows no Ray, no method and
no model.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from bachvid.attention.control import AttentionSite
from bachvid.errors import CacheMissError, CorruptShardError, WorkerError
from bachvid.kv.cache import SAME_CONFIG, KVShard
from bachvid.kv.packing import PackedStep, sites_of, sites_read
from bachvid.kv.pieces import Bytes, by_heads, checksum, copy_and_sum, key_and_value, piece_bytes
from bachvid.layout.gangs import Branch, RankShare, cut_passes

FetchStep = Callable[[int, int], Sequence[PackedStep]]  # (run, step); waits until all are there

_NUM_SLOTS = 2  # one that is read, one that is filled


class PulledKVStore:
    """The store that a frame video reads: a thread pulls packed steps and stages their layers.

    Each layer is copied, one layer ahead of the reader, into one of two slots (pinned where there
    is CUDA), checked there, and handed out from there: nothing ever points into what was fetched,
    which other processes may share. A shard is valid until the next layer is asked for.
    Memory: two layers, and one fetched step until its last layer is staged.

    `share` is what this rank reads, of what `branches` are recorded; `passes` are the forwards of
    a step, in their order, by the branches that share one. `fetch(run, step)` gives the blocks of
    all ranks that recorded something of it; it counts the runs from 0, one for each `begin`; it is
    called in the thread, and once more for a step of which a layer is damaged. `nbytes` is what
    all recorded steps have. Close the store when the video is over, also when it failed: its
    thread holds memory. Whoever makes `fetch` sees to it that it returns or raises after `close`.
    """

    def __init__(
        self,
        fetch: FetchStep,
        *,
        share: RankShare,
        layers: Sequence[int],
        branches: Sequence[Branch],
        passes: Sequence[Sequence[Branch]],
        config_hash: str,
        nbytes: int,
    ) -> None:
        self._fetch = fetch
        self._share, self._layers = share, tuple(layers)
        self._branches = tuple(branch for branch in branches if branch in share.branches)
        self._passes = cut_passes(passes, self._branches)
        self._config_hash, self._nbytes = config_hash, nbytes
        self._run = -1
        self._ahead: deque[AttentionSite] = deque()
        self._pull: _Pull | None = None
        self._staged: _StagedLayer | None = None
        self.wait_seconds = 0.0  # that `get` had to wait for a layer, over all runs

    def put(self, shard: KVShard) -> None:
        """Refuse: raises WorkerError."""
        raise WorkerError("a frame video only reads keys and values: record an identity video")

    def begin(self, steps: Sequence[int]) -> None:
        """Start to pull what the next run reads. What the run before left unread is dropped."""
        self.close()
        self._pull = self._staged = None
        self._run += 1
        run = self._run
        order = {step: sites_read(step, self._layers, self._passes) for step in steps}
        self._ahead = deque(site for sites in order.values() for site in sites)
        if self._ahead:
            self._pull = _Pull(lambda step: self._fetch_checked(run, step), order, self._share)

    def get(self, site: AttentionSite) -> KVShard:
        """Return the next shard; valid until that of another layer is asked for.

        Raises:
            CacheMissError: it is not the next one, or the store is closed.
            CorruptShardError: its bytes are damaged, also when they are fetched again.
            Whatever `fetch` raises.
        """
        if self._pull is None or not self._ahead or self._ahead[0] != site:
            following = _name(self._ahead[0]) if self._ahead else "nothing"
            raise CacheMissError(
                f"the keys and values of {_name(site)} were asked for, {following} is next: "
                f"they come once, in the order in which they were announced; {SAME_CONFIG}"
            )
        staged = self._staged
        if staged is None or site not in staged.sites:
            if staged is not None:
                self._pull.give_back(staged.slot)
                self._staged = None
            start = time.perf_counter()
            try:
                staged = self._staged = self._pull.next_layer()
            finally:
                self.wait_seconds += time.perf_counter() - start
        self._ahead.popleft()
        return staged.shard(site)

    @property
    def nbytes(self) -> int:
        """Bytes of all recorded steps."""
        return self._nbytes

    def close(self) -> None:
        """End the thread; one that is within `fetch` ends when that returns. For any thread."""
        if self._pull is not None:
            self._pull.stop()

    def _fetch_checked(self, run: int, step: int) -> Sequence[PackedStep]:
        """Fetch the blocks of a step; they must hold what this rank reads, all of it and once."""
        packs = self._fetch(run, step)
        for header in (packed.header for packed in packs):
            branches = tuple(dict.fromkeys(site.branch for site in header.sites))
            found = (header.step, header.sites, header.config_hash)
            if found != (step, sites_of(step, self._layers, branches), self._config_hash):
                raise CacheMissError(
                    f"what came as step {step} is step {header.step} with {len(header.sites)} "
                    f"sites under config {header.config_hash[:12]}, wanted are the layers "
                    f"{self._layers} under {self._config_hash[:12]}; {SAME_CONFIG}"
                )
        share = self._share
        wanted = list(range(share.first_head, share.last_head))
        for site in sites_of(step, self._layers[:1], self._branches):
            heads = sorted(head for packed in packs for head in _heads_read(packed, site, share))
            if heads != wanted:
                raise CacheMissError(
                    f"of step {step}, branch {site.branch}, came the heads {heads}, wanted are "
                    f"{wanted}; {SAME_CONFIG}"
                )
        return packs


def _heads_read(packed: PackedStep, site: AttentionSite, share: RankShare) -> range:
    """Return the heads of a site that are in a block and are also of a share."""
    header = packed.header
    if site not in header.sites:
        return range(0)
    first = max(header.first_head, share.first_head)
    return range(first, min(header.first_head + header.shape[2], share.last_head))


@dataclass(frozen=True, slots=True)
class _StagedLayer:
    """One layer of a step in its slot, with the keys' dtype and shape."""

    sites: tuple[AttentionSite, ...]
    dtype: torch.dtype
    shape: torch.Size
    slot: Tensor

    def shard(self, site: AttentionSite) -> KVShard:
        piece = self.slot.view(len(self.sites), -1)[self.sites.index(site)]
        return KVShard(site, *key_and_value(piece, self.dtype, self.shape))


class _Pull:
    """The thread of one run: fetches its steps and stages their layers, as slots become free.

    `order` has the sites of each step in the order in which they are read.
    """

    def __init__(
        self,
        fetch: Callable[[int], Sequence[PackedStep]],
        order: Mapping[int, Sequence[AttentionSite]],
        share: RankShare,
    ) -> None:
        self._fetch, self._order, self._share = fetch, order, share
        self._free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        for _ in range(_NUM_SLOTS):
            self._free.put(None)  # made when the first step says how large
        self._ready: queue.SimpleQueue[_StagedLayer | BaseException] = queue.SimpleQueue()
        self._stopped = threading.Event()
        threading.Thread(target=self._work, name="bachvid-pull", daemon=True).start()

    def next_layer(self) -> _StagedLayer:
        """Wait for the next layer. Raises what went wrong in the thread."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # for whoever asks again: the thread has ended
            raise item
        return item

    def give_back(self, slot: Tensor) -> None:
        """Let the thread write into `slot` again."""
        self._free.put(slot)

    def stop(self) -> None:
        """End the thread, and whoever waits for it."""
        self._stopped.set()
        self._free.put(None)
        self._ready.put(CacheMissError("the keys and values are closed: render the video again"))

    def _work(self) -> None:
        try:
            for step in self._order:
                self._stage_step(step)
                if self._stopped.is_set():
                    return
        except BaseException as error:  # raised again where the video is rendered
            self._ready.put(error)

    def _stage_step(self, step: int) -> None:
        packs = self._fetch(step)
        for _, group in groupby(self._order[step], key=lambda site: site.layer):
            sites = tuple(group)
            slot = self._free.get()
            if self._stopped.is_set():
                return
            staged, damaged = _stage(packs, sites, self._share, slot)
            if damaged is not None:
                packs = self._fetch(step)
                staged, damaged = _stage(packs, sites, self._share, staged.slot)
            if damaged is not None:
                raise CorruptShardError(
                    f"the identity keys and values of {_name(damaged)} are damaged, also when "
                    f"fetched again: memory or network changed them on the way; they are dropped, "
                    f"and the identity video is rendered again"
                )
            self._ready.put(staged)


def _stage(
    packs: Sequence[PackedStep],
    sites: tuple[AttentionSite, ...],
    share: RankShare,
    slot: Tensor | None,
) -> tuple[_StagedLayer, AttentionSite | None]:
    """Copy a layer's sites into `slot`, or a new one; give also a site whose bytes are damaged."""
    header = packs[0].header
    dtype: torch.dtype = getattr(torch, header.dtype)
    shape = torch.Size((*header.shape[:2], share.num_heads, header.shape[3]))
    if slot is None:
        size = piece_bytes(dtype, shape) * len(sites)
        slot = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    staged = _StagedLayer(sites, dtype, shape, slot)
    damaged = None
    for site, target in zip(sites, slot.numpy().reshape(len(sites), -1), strict=True):
        for packed in packs:
            if not _copy_heads(packed, site, share, target, staged):
                damaged = site
    return staged, damaged


def _copy_heads(
    packed: PackedStep, site: AttentionSite, share: RankShare, target: Bytes, staged: _StagedLayer
) -> bool:
    """Copy what a block has of a site into its piece `target`; give whether it is undamaged."""
    header, heads = packed.header, _heads_read(packed, site, share)
    if not heads:
        return True
    place, size = header.sites.index(site), len(packed.payload) // len(header.sites)
    source = packed.payload[place * size : (place + 1) * size]
    if (header.first_head, header.shape) == (share.first_head, staged.shape):
        return copy_and_sum(source, target) == header.checksums[place]
    # The sum is that of all heads in the block: it is taken apart from the copy of some.
    read = slice(heads.start - header.first_head, heads.stop - header.first_head)
    written = slice(heads.start - share.first_head, heads.stop - share.first_head)
    np.copyto(
        by_heads(target, staged.dtype, staged.shape)[..., written, :],
        by_heads(source, staged.dtype, torch.Size(header.shape))[..., read, :],
    )
    return checksum(source) == header.checksums[place]


def _name(site: AttentionSite) -> str:
    return f"step {site.step}, layer {site.layer}, branch {site.branch}"
