"""How fast keys and values go from an identity worker to a frame worker, over a plain memory copy.

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

import numpy as np
import ray
import torch

from bachvid.kv.cache import KVShard
from bachvid.kv.packing import PackedStep, StepPacker, sites_of
from bachvid.kv.pulling import PulledKVStore
from bachvid.layout.gangs import RankShare

LAYERS, BRANCHES = tuple(range(8)), ("cond",)
SHAPE = (1, 4096, 16, 64)  # keys of one layer: tokens x heads x channels, 8 MiB in bfloat16
WINDOW = 2  # steps that are alive
ROUNDS = 12
ALL = RankShare(BRANCHES, 0, SHAPE[2])

Seconds = dict[str, float]


def timed(seconds: Seconds, name: str, call: Callable[[], object]) -> None:
    """Run `call` and note how long it took."""
    start = time.perf_counter()
    call()
    seconds[name] = time.perf_counter() - start


class IdentityActor:
    """Publishes steps of random keys and values; each step's are others."""

    def __init__(self) -> None:
        self._packer = StepPacker(share=ALL, layers=LAYERS, branches=BRANCHES, config_hash="")
        numel = torch.Size(SHAPE).numel()
        self._numbers = torch.randn(2 * len(LAYERS) * numel + 1000).bfloat16()
        self._copy = np.zeros(0, dtype=np.uint8)

    def publish(self, steps: range) -> Iterator[PackedStep | Seconds]:
        """Yield each packed step, then the seconds that it took."""
        for step in steps:
            seconds: Seconds = {}
            timed(seconds, "pack", lambda step=step: self._pack(step))
            packed = self._packer.take(step)
            assert packed is not None
            if not len(self._copy):
                self._copy = packed.payload.copy()
            timed(seconds, "copy", lambda packed=packed: np.copyto(self._copy, packed.payload))
            start = time.perf_counter()
            yield packed
            seconds["put"] = time.perf_counter() - start
            yield seconds

    def _pack(self, step: int) -> None:
        numbers = self._numbers[step : step + 2 * len(LAYERS) * torch.Size(SHAPE).numel()]
        keys_and_values = numbers.view(len(LAYERS), 2, *SHAPE)
        for site in sites_of(step, LAYERS, BRANCHES):
            self._packer.put(KVShard(site, *keys_and_values[site.layer]))


class FrameActor:
    """Reads what was published, as a frame video does, but computes nothing in between."""

    def __init__(self) -> None:
        self._copy = np.zeros(0, dtype=np.uint8)
        self._refs: defaultdict[int, Future[ray.ObjectRef[PackedStep]]] = defaultdict(Future)
        self._store = PulledKVStore(
            lambda run, step: [ray.get(self._refs[step].result())],
            share=ALL,
            layers=LAYERS,
            branches=BRANCHES,
            passes=[BRANCHES],
            config_hash="",
            nbytes=0,
        )
        self._store.begin(range(ROUNDS * WINDOW))

    def read(self, refs: dict[int, ray.ObjectRef[PackedStep]]) -> Seconds:
        """Read every site of the steps, then copy as many bytes; give the seconds of each."""
        seconds: Seconds = {}
        timed(seconds, "pulled", lambda: self._read(refs))
        given = ray.get(next(iter(refs.values()))).payload
        if not len(self._copy):
            self._copy = given.copy()
        timed(seconds, "copy", lambda: [np.copyto(self._copy, given) for _ in refs])
        for step in refs:
            del self._refs[step]
        return {name: value / len(refs) for name, value in seconds.items()}

    def _read(self, refs: dict[int, ray.ObjectRef[PackedStep]]) -> None:
        for step, ref in refs.items():
            self._refs[step].set_result(ref)
        for step in refs:
            for site in sites_of(step, LAYERS, BRANCHES):
                # Checked: it would fail if the packer had used its buffer again too soon.
                self._store.get(site)


def measure() -> tuple[int, list[Seconds]]:
    """Run all rounds; return the bytes of a step, and the seconds of one in each round."""
    identity = ray.remote(num_cpus=1)(IdentityActor).remote()
    frame = ray.remote(num_cpus=1)(FrameActor).remote()
    num_bytes, rounds = 0, []
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
