"""Keys and values on their way from the process that recorded them to those that read them.

An identity worker packs each step into one block of bytes (`StepPacker`), whatever carries it
gives the block to the frame workers, and each of them reads it layer by layer, one layer ahead
of its video (`PulledKVStore`). Knows no Ray, no method and no model.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bachvid.attention import AttentionSite
from bachvid.cache import SAME_CONFIG, KVShard
from bachvid.errors import CacheMissError, CorruptShardError, WorkerError
from bachvid.gangs import Branch
from bachvid.kv_bytes import Bytes, checksum, copy_and_sum, key_and_value, piece_bytes

FetchStep = Callable[[int, int], "PackedStep"]  # (run, step); waits until the step is there

_NUM_SLOTS = 2  # one that is read, one that is filled


@dataclass(frozen=True, slots=True)
class StepHeader:
    """What a packed step holds: the key tensors' dtype, by torch's name, and their shape.

    `checksums` are those of the sites, in their order.
    """

    step: int
    sites: tuple[AttentionSite, ...]
    dtype: str
    shape: tuple[int, ...]
    checksums: tuple[bytes, ...]
    config_hash: str


@dataclass(frozen=True, slots=True, eq=False)
class PackedStep:
    """All keys and values of one step. Pickles with the payload out of band: without a copy.

    The payload holds the pieces of the sites, in their order; all are of one size.
    """

    header: StepHeader
    payload: Bytes


def sites_of(
    step: int, layers: Sequence[int], branches: Sequence[Branch]
) -> tuple[AttentionSite, ...]:
    """Give the sites of one step in the order in which a run reads them."""
    return tuple(AttentionSite(step, layer, branch) for layer in layers for branch in branches)


class StepPacker:
    """The store that an identity video writes: it packs one step at a time.

    Memory: one step. Every step is packed into the same buffer, because memory that is written
    for the first time costs several times the copy. So a packed step must have been sent, or
    copied, before the next shard is put. Ray does: it copies what a generator yields before it
    resumes the generator.
    """

    def __init__(
        self, *, layers: Sequence[int], branches: Sequence[Branch], config_hash: str
    ) -> None:
        self._layers, self._branches = tuple(layers), tuple(branches)
        self._config_hash = config_hash
        self._buffer: Tensor | None = None
        self._dtype, self._shape = torch.uint8, torch.Size()
        self._checksums: dict[AttentionSite, bytes] = {}
        self._step_bytes: dict[int, int] = {}

    def put(self, shard: KVShard) -> None:
        """Copy a shard of the current step; one of the same site is replaced."""
        sites = sites_of(shard.site.step, self._layers, self._branches)
        assert self._checksums.keys() <= set(sites), "take the step before"
        key_BMHD = shard.key_BMHD
        num_bytes = piece_bytes(key_BMHD.dtype, key_BMHD.shape)
        if self._buffer is None:
            self._dtype, self._shape = key_BMHD.dtype, key_BMHD.shape
            # Zeros: the padding is part of the checksum. Pinned: the GPU writes it directly.
            self._buffer = torch.zeros(
                num_bytes * len(sites), dtype=torch.uint8, pin_memory=key_BMHD.is_cuda
            )
        assert (key_BMHD.dtype, key_BMHD.shape) == (self._dtype, self._shape)
        start = sites.index(shard.site) * num_bytes
        piece = self._buffer[start : start + num_bytes]
        packed_key, packed_value = key_and_value(piece, self._dtype, self._shape)
        packed_key.copy_(key_BMHD)
        packed_value.copy_(shard.value_BMHD)
        self._checksums[shard.site] = checksum(piece.numpy())

    def take(self, step: int) -> PackedStep | None:
        """Give the packed step, None if nothing was put, and be ready for the next one."""
        if not self._checksums:
            return None
        sites = sites_of(step, self._layers, self._branches)
        assert self._buffer is not None
        assert self._checksums.keys() == set(sites), "not a whole step"
        header = StepHeader(
            step=step,
            sites=sites,
            dtype=str(self._dtype).removeprefix("torch."),
            shape=tuple(self._shape),
            checksums=tuple(self._checksums[site] for site in sites),
            config_hash=self._config_hash,
        )
        self._checksums = {}
        self._step_bytes[step] = self._buffer.nbytes
        return PackedStep(header, self._buffer.numpy())

    def begin(self, steps: Sequence[int]) -> None:
        """Do nothing: nobody reads here."""

    def get(self, site: AttentionSite) -> KVShard:
        """Refuse: raises CacheMissError."""
        raise CacheMissError(
            f"no identity keys and values for step {site.step}, layer {site.layer}: they are sent "
            f"away, step by step; read them where they arrive"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all steps that were packed; a step that was packed again counts once."""
        return sum(self._step_bytes.values())


class PulledKVStore:
    """The store that a frame video reads: a thread pulls packed steps and stages their layers.

    Each layer is copied, one layer ahead of the reader, into one of two slots (pinned where there
    is CUDA), checked there, and handed out from there: nothing ever points into what was fetched,
    which other processes may share. A shard is valid until the next layer is asked for.
    Memory: two layers, and one fetched step until its last layer is staged.

    `fetch(run, step)` counts the runs from 0, one for each `begin`; it is called in the thread,
    and once more for a step of which a layer is damaged. `nbytes` is what all recorded steps have.
    Close the store when the video is over, also when it failed: its thread holds memory. Whoever
    makes `fetch` sees to it that it returns or raises after `close`.
    """

    def __init__(
        self,
        fetch: FetchStep,
        *,
        layers: Sequence[int],
        branches: Sequence[Branch],
        config_hash: str,
        nbytes: int,
    ) -> None:
        self._fetch = fetch
        self._layers, self._branches = tuple(layers), tuple(branches)
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
        run, steps = self._run, tuple(steps)
        self._ahead = deque(
            site for step in steps for site in sites_of(step, self._layers, self._branches)
        )
        if steps:
            self._pull = _Pull(lambda step: self._fetch_checked(run, step), steps)

    def get(self, site: AttentionSite) -> KVShard:
        """Give the next shard; valid until that of another layer is asked for.

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

    def _fetch_checked(self, run: int, step: int) -> PackedStep:
        packed = self._fetch(run, step)
        header = packed.header
        found = (header.step, header.sites, header.config_hash)
        if found != (step, sites_of(step, self._layers, self._branches), self._config_hash):
            raise CacheMissError(
                f"what came as step {step} is step {header.step} with {len(header.sites)} sites "
                f"under config {header.config_hash[:12]}, wanted are the layers {self._layers} "
                f"and branches {self._branches} under {self._config_hash[:12]}; {SAME_CONFIG}"
            )
        return packed


@dataclass(frozen=True, slots=True)
class _StagedLayer:
    """One layer of a step in its slot; `header` is the step's, `sites` are the layer's."""

    header: StepHeader
    sites: tuple[AttentionSite, ...]
    slot: Tensor

    def shard(self, site: AttentionSite) -> KVShard:
        pieces = self.slot.view(len(self.sites), -1)
        dtype: torch.dtype = getattr(torch, self.header.dtype)
        piece = pieces[self.sites.index(site)]
        return KVShard(site, *key_and_value(piece, dtype, torch.Size(self.header.shape)))


class _Pull:
    """The thread of one run: fetches its steps and stages their layers, as slots become free."""

    def __init__(self, fetch: Callable[[int], PackedStep], steps: Sequence[int]) -> None:
        self._fetch = fetch
        self._steps = steps
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
            for step in self._steps:
                self._stage_step(step)
                if self._stopped.is_set():
                    return
        except BaseException as error:  # raised again where the video is rendered
            self._ready.put(error)

    def _stage_step(self, step: int) -> None:
        packed = self._fetch(step)
        sites = packed.header.sites
        for layer in dict.fromkeys(site.layer for site in sites):
            slot = self._free.get()
            if self._stopped.is_set():
                return
            own = tuple(site for site in sites if site.layer == layer)
            staged, damaged = _stage(packed, own, slot)
            if damaged is not None:
                packed = self._fetch(step)
                staged, damaged = _stage(packed, own, staged.slot)
            if damaged is not None:
                raise CorruptShardError(
                    f"the identity keys and values of {_name(damaged)} are damaged, also when "
                    f"fetched again: memory or network changed them on the way; they are dropped, "
                    f"and the identity video is rendered again"
                )
            self._ready.put(staged)


def _stage(
    packed: PackedStep, sites: tuple[AttentionSite, ...], slot: Tensor | None
) -> tuple[_StagedLayer, AttentionSite | None]:
    """Copy a layer's sites into `slot`, or a new one; give also a site whose copy is damaged."""
    header = packed.header
    size = len(packed.payload) // len(header.sites)
    if slot is None:
        slot = torch.empty(
            size * len(sites), dtype=torch.uint8, pin_memory=torch.cuda.is_available()
        )
    damaged = None
    for site, target in zip(sites, slot.numpy().reshape(-1, size), strict=True):
        place = header.sites.index(site)
        source = packed.payload[place * size : (place + 1) * size]
        if copy_and_sum(source, target) != header.checksums[place]:
            damaged = site
    return _StagedLayer(header, sites, slot), damaged


def _name(site: AttentionSite) -> str:
    return f"step {site.step}, layer {site.layer}, branch {site.branch}"
