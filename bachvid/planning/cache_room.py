"""Chooses how long the keys and values of identity videos are kept: what fits, and what is faster.

Pure: no torch and no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from typing import Any

from bachvid.errors import ConfigError
from bachvid.inputs.choices import Policy
from bachvid.inputs.sections import CacheConfig
from bachvid.methods.base import Method
from bachvid.methods.reading import ReadingOrder, can_stream
from bachvid.planning.nodes import NodeFacts
from bachvid.units import format_bytes, pluralize

STORE_SHARE = 0.8  # of the object store; when it is fuller than that Ray spills to disk
_PATIENCE = 1.05  # as much longer may a render with `window` take, since it saves memory and disk


class CacheRoom:
    """How the identity caches of a story fit into the stores of the nodes with workers.

    `frames` are the frame videos of every scene; `cache_bytes` are the keys and values of one
    scene. Where workers are split, one renders all identity videos, and nothing else.
    """

    def __init__(
        self,
        config: CacheConfig,
        method: Method[Any],
        placed: Sequence[tuple[NodeFacts, int]],
        frames: Sequence[int],
        cache_bytes: int,
        *,
        is_split: bool,
    ) -> None:
        self._config, self._placed, self._is_split = config, placed, is_split
        self._frames, self._cache_bytes = frames, cache_bytes
        self._num_workers = sum(workers for _, workers in placed)
        num_steps = len(method.records.steps)
        self._step_bytes = cache_bytes // max(num_steps, 1)
        self._window = min(config.window, num_steps)
        self._can_stream = can_stream(method)
        self._smallest = min((node for node, _ in placed), key=lambda node: node.store_bytes)
        self._frame_steps = sum(len(run.steps) for run in method.runs("frame"))
        # In a wave the identity video is run again for its readers.
        identity_runs = ReadingOrder(method, is_window=True).identity_runs
        self._wave_steps = max(self._frame_steps, sum(len(run.steps) for run in identity_runs))
        # A wave: the identity video, and as many frame videos as there are other workers.
        waves = sorted(1 + min(count, self._num_workers - 1) for count in frames)
        fitting = sum(total <= self._num_workers for total in accumulate(waves))
        self._waves_at_once = min(fitting, 1) if is_split else fitting

    @property
    def live_scenes(self) -> int:
        """Caches that fit on every node: an identity video may run on any of them."""
        room = _room(self._smallest) + int(self._config.spill_gb * 10**9)
        fitting = room // self._cache_bytes if self._cache_bytes else len(self._frames)
        return min(fitting, len(self._frames))

    def num_waves(self, policy: Policy) -> int:
        """Count waves, or rounds of all workers."""
        if policy == "retain":
            videos, scenes = sum(self._frames) + len(self._frames), len(self._frames)
            if self._is_split:
                return ceil(max(sum(self._frames) / (self._num_workers - 1), scenes))
            live = max(self.live_scenes, 1) * len(self._placed)  # no other scenes have work
            return ceil(max(videos / self._num_workers, scenes / live))
        others = max(self._num_workers - 1, 1)
        return sum(max(ceil(count / others), 1) for count in self._frames)

    def bytes_on(self, workers: int, policy: Policy) -> int:
        """Return the bytes of keys and values that a node with so many workers holds at most."""
        if policy == "retain":
            return self.live_scenes * self._cache_bytes
        # Every wave that has a worker there may need all its steps there.
        return min(self._waves_at_once, workers) * self._window * self._step_bytes

    def choose(self) -> tuple[Policy, str]:
        """Return the policy and why. Raises ConfigError if it does not fit."""
        policy = self._config.policy
        if policy == "auto":
            chosen, why = self._choose()
        else:
            chosen, why = policy, f"cache.policy is {policy}"
        problem = self._window_problem() if chosen == "window" else self._retain_problem()
        if problem is not None:
            raise ConfigError(problem)
        return chosen, why

    def _choose(self) -> tuple[Policy, str]:
        most, workers = max(self._frames), self._num_workers
        kept = f"{format_bytes(self._cache_bytes)} for a scene"
        if not self._cache_bytes:
            return "retain", "no keys and values are kept"
        if not self._can_stream:
            return "retain", (
                f"the method reads steps in another order than they are recorded in; so all keys "
                f"and values are kept, {kept}"
            )
        if most + 1 > workers:
            return "retain", (
                f"a scene has {pluralize(most, 'frame video')}, and of "
                f"{pluralize(workers, 'worker')} only {workers - 1} can render them "
                f"while one renders the identity video; so all keys and values are kept, {kept}"
            )
        can_retain = self._retain_problem() is None
        if can_retain and self._window_problem() is not None:
            return "retain", (
                f"{pluralize(self._waves_at_once, 'wave')} at a time of {self._window} steps each "
                f"do not fit the object store; so all keys and values are kept, {kept}"
            )
        rounds = self._wave_rounds()
        slow, fast = rounds * self._wave_steps, self.num_waves("retain") * self._frame_steps
        # With a single wave no worker is idle for long; with more, idle workers add up.
        if can_retain and rounds > 1 and slow > _PATIENCE * fast:
            return "retain", (
                f"whole waves of up to {most + 1} videos would keep {workers} workers for "
                f"{slow} steps, one after another; with all keys and values kept, {kept}, it is "
                f"{fast}"
            )
        return "window", (
            f"{pluralize(most, 'frame video')} and their identity video fit in one wave of "
            f"{workers} workers; so {pluralize(self._window, 'step')} of keys and values are kept, "
            f"{format_bytes(self._window * self._step_bytes)}, instead of {kept}"
        )

    def _wave_rounds(self) -> int:
        """Count how often the workers are filled with whole waves, in story order."""
        rounds, free = 0, 0
        for count in self._frames:
            if free < 1 + count or (self._is_split and free < self._num_workers):
                rounds, free = rounds + 1, self._num_workers
            free -= 1 + count
        return rounds

    def _window_problem(self) -> str | None:
        if not self._can_stream:
            return (
                "cache.policy: is window: the method reads steps in another order than they are "
                "recorded in; set cache.policy=retain"
            )
        if self._num_workers < 2 and max(self._frames):
            return (
                "cache.policy: is window: needs at least 2 workers, one for the identity video and "
                "one for a frame video at the same time; the plan has 1. Set cache.policy=retain, "
                "or give the cluster more"
            )
        for node, workers in self._placed:
            needed = self.bytes_on(workers, "window")
            if needed > _room(node):
                waves = min(self._waves_at_once, workers)
                return (
                    f"cache.window: is {self._window} steps of {format_bytes(self._step_bytes)}: "
                    f"for {pluralize(waves, 'scene')} at a time that is {format_bytes(needed)}, "
                    f"and {_store_text(node)}. Set a smaller cache.window, or fewer "
                    f"cluster.workers, or start Ray there with {_store_option(needed)}"
                )
        return None

    def _retain_problem(self) -> str | None:
        if self.live_scenes:
            return None
        missing = self._cache_bytes - _room(self._smallest)
        window = format_bytes(self._window * self._step_bytes)
        return (
            f"cache.policy: {'is' if self._config.policy == 'retain' else 'comes out as'} retain, "
            f"which keeps {format_bytes(self._cache_bytes)} of keys and values for a scene: "
            f"{_store_text(self._smallest)}, and cache.spill_gb is {self._config.spill_gb:g}. Set "
            f"cache.policy=window (keeps {window} and renders the identity video once for every "
            f"wave; needs 2 workers), or cache.spill_gb={ceil(missing / 10**9)} if the disk has "
            f"that, or start Ray there with {_store_option(self._cache_bytes)}"
        )


def _room(node: NodeFacts) -> int:
    return int(node.store_bytes * STORE_SHARE)


def _store_text(node: NodeFacts) -> str:
    return (
        f"node {node.name} has room for {format_bytes(_room(node))}, {STORE_SHARE:.0%} of "
        f"its object store of {format_bytes(node.store_bytes)}"
    )


def _store_option(needed: int) -> str:
    return f"--object-store-memory {ceil(needed / STORE_SHARE)}"
