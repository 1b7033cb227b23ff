"""How fast pieces go from an identity worker to a frame worker, over a plain memory copy.

    python benchmarks/transport.py

Starts a Ray of its own with one identity actor and one frame actor, which take turns. Each round
sends a window of steps and lets go of them, so that the store's pages are used again; the first
round, on pages never touched before, is shown apart. The copy is made in the same rounds, from
and to memory that was used before.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from bachvid.kv.cache import Shard
from bachvid.kv.packing import PackedStep, StepPacker
from bachvid.kv.pulling import PulledPieces
from bachvid.layout.gangs import Branch, RankShare
from bachvid.layout.records import Kind, Records, RecordSet

NUM_LAYERS = 8
KINDS: tuple[Kind, ...] = ("key", "value")
BRANCHES: tuple[Branch, ...] = ("cond",)
SHAPE = (1, 4096, 16, 64)  # a piece: tokens x heads x channels, 8 MiB in bfloat16
WINDOW = 2  # steps that are alive
ROUNDS = 12
STEPS = tuple(range(ROUNDS * WINDOW))
RECORDS = Records((RecordSet(KINDS, tuple(range(NUM_LAYERS)), STEPS, BRANCHES),))
ALL = RankShare(BRANCHES, 0, SHAPE[2])

Seconds = dict[str, float]


def timed(seconds: Seconds, name: str, call: Callable[[], object]) -> None:
    """Run `call` and note how long it took."""
    start = time.perf_counter()
    call()
    seconds[name] = time.perf_counter() - start


class IdentityActor:
    """Publishes steps of random numbers; each step's are others."""

    def __init__(self) -> None:
        self._packer = StepPacker(share=ALL, records=RECORDS, config_hash="")
        self._shape = (NUM_LAYERS, len(KINDS), *SHAPE)
        self._numbers = torch.randn(torch.Size(self._shape).numel() + 1000).bfloat16()
        self._copy = np.zeros(0, dtype=np.uint8)

    def publish(self, steps: range) -> Iterator[PackedStep | Seconds]:
        """Yield each packed step, then the seconds that it took."""
        for step in steps:
            seconds: Seconds = {}
            timed(seconds, "pack", partial(self._pack, step))
            packed = self._packer.take(step)
            assert packed is not None
            if not len(self._copy):
                self._copy = packed.payload.copy()
            timed(seconds, "copy", partial(np.copyto, self._copy, packed.payload))
            start = time.perf_counter()
            yield packed
            seconds["put"] = time.perf_counter() - start
            yield seconds

    def _pack(self, step: int) -> None:
        numbers = self._numbers[step : step + torch.Size(self._shape).numel()]
        layers = numbers.view(self._shape)
        for site in RECORDS.sites(step):
            self._packer.put(Shard(site, dict(zip(KINDS, layers[site.layer], strict=True))))


class FrameActor:
    """Reads what was published, as a frame video does, but computes nothing in between."""

    def __init__(self) -> None:
        self._copy = np.zeros(0, dtype=np.uint8)
        self._refs: defaultdict[int, Future[ray.ObjectRef[PackedStep]]] = defaultdict(Future)
        self._source = PulledPieces(
            lambda run, place: [ray.get(self._refs[STEPS[place]].result())],
            share=ALL,
            records=RECORDS,
            passes=[BRANCHES],
            config_hash="",
        )
        self._source.begin(STEPS)

    def read(self, refs: dict[int, ray.ObjectRef[PackedStep]]) -> Seconds:
        """Read every site of the steps, then copy one step; return the seconds of one step each."""
        seconds: Seconds = {}
        timed(seconds, "pulled", lambda: self._read(refs))
        given = ray.get(next(iter(refs.values()))).payload
        if not len(self._copy):
            self._copy = given.copy()
        timed(seconds, "copy", partial(np.copyto, self._copy, given))
        for step in refs:
            del self._refs[step]
        return {"pulled": seconds["pulled"] / len(refs), "copy": seconds["copy"]}

    def _read(self, refs: dict[int, ray.ObjectRef[PackedStep]]) -> None:
        for step, ref in refs.items():
            self._refs[step].set_result(ref)
        for step in refs:
            for site in RECORDS.sites(step):
                # Checked: it would fail if the packer had used its buffer again too soon.
                self._source.get(site)


def measure() -> tuple[int, list[Seconds]]:
    """Run all rounds; return the bytes of a step, and the seconds of one in each round."""
    identity: Any = ray.remote(num_cpus=1)(IdentityActor).remote()
    frame: Any = ray.remote(num_cpus=1)(FrameActor).remote()
    num_bytes = 0
    rounds: list[Seconds] = []
    for i in range(ROUNDS):
        steps = range(i * WINDOW, (i + 1) * WINDOW)
        items = list(identity.publish.options(num_returns="streaming").remote(steps))
        refs = dict(zip(steps, items[::2], strict=True))
        published = ray.get(items[1::2])
        num_bytes = ray.get(items[0]).payload.nbytes
        del items
        pulled = ray.get(frame.read.remote(refs))
        del refs  # the store frees the steps, and uses their pages for the next ones
        rounds.append(
            {
                "copy": min(pulled["copy"], *(seconds["copy"] for seconds in published)),
                "pack": min(seconds["pack"] for seconds in published),
                "put": min(seconds["put"] for seconds in published),
                "pulled": pulled["pulled"],
            }
        )
    return num_bytes, rounds


def main() -> None:
    """Print each way's bytes per second over those of a memory copy."""
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**9, log_to_driver=False)
    try:
        num_bytes, rounds = measure()
    finally:
        ray.shutdown()
    best = {name: min(seconds[name] for seconds in rounds[1:]) for name in rounds[0]}
    best["pack and put"] = best["pack"] + best["put"]
    best["put, first pages"] = rounds[0]["put"]
    labels = {
        "copy": "plain memory copy",
        "pack": "packed: copied and summed",
        "put": "put: a packed step into the store",
        "pulled": "pulled: got, staged, checked",
        "pack and put": "packed and put",
        "put, first pages": "put on pages never touched before",
    }
    print(f"{num_bytes / 2**20:.0f} MiB a step, window of {WINDOW}, best of {ROUNDS - 1} rounds")
    for name, label in labels.items():
        print(
            f"{label:<34} {best['copy'] / best[name]:.2f} x copy  "
            f"({num_bytes / best[name] / 1e9:.1f} GB/s)"
        )


if __name__ == "__main__":
    main()
