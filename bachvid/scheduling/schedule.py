"""Which worker renders which video next. Pure: no torch, no Ray, no clock.

Over 350 lines: the states of a scene and every move between them belong together.

The driver reports what happened and asks for what to start; time passes only between its calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal

from bachvid.inputs.choices import Policy
from bachvid.inputs.story import IDENTITY_ID

VideoState = Literal["pending", "running", "done", "failed"]
Kind = Literal["identity", "frame", "any"]

FRAME_ATTEMPTS, IDENTITY_ATTEMPTS = 3, 2


@dataclass(frozen=True, slots=True)
class SceneWork:
    """The frame videos of a scene that are to be rendered.

    `needs_identity` is False if there is an identity cache already, in files.
    """

    id: str
    frames: tuple[str, ...]
    needs_identity: bool = True


@dataclass(frozen=True, slots=True)
class Slot:
    """An idle worker, the node it is on, and which videos it renders."""

    worker: int
    node: str
    kind: Kind = "any"


@dataclass(frozen=True, slots=True)
class Assignment:
    """A video for a worker; IDENTITY_ID is the identity video of its scene."""

    worker: int
    scene: str
    video: str


@dataclass(slots=True)
class _Scene:
    """State of one scene. It is live from its identity's start until its cache may go."""

    index: int
    work: SceneWork
    is_retained: bool  # its cache lasts until the scene is over; if not, until its wave is
    states: dict[str, VideoState]
    pending: list[int]  # heap of places in work.frames; what is not pending any more is skipped
    num_pending: int
    running: dict[str, None] = field(default_factory=dict)  # frame videos, as they were started
    losses: dict[str, int] = field(default_factory=dict)
    is_live: bool = False
    is_rendered: bool = False  # the identity video was done once
    node: str | None = None  # of the identity cache

    @property
    def identity(self) -> VideoState:
        return self.states[IDENTITY_ID]

    @property
    def is_running(self) -> bool:
        return bool(self.running) or self.identity == "running"

    @property
    def is_over(self) -> bool:
        return not (self.num_pending or self.is_running or self.identity == "pending")

    def pop_frame(self) -> str:
        """Take the first pending frame video, in story order."""
        while True:
            video = self.work.frames[heappop(self.pending)]
            if self.states[video] == "pending":
                return video

    def move(self, video: str, state: VideoState) -> None:
        if video != IDENTITY_ID:
            self.num_pending += (state == "pending") - (self.states[video] == "pending")
            self.running.pop(video, None)
            if state == "running":
                self.running[video] = None
            elif state == "pending":
                heappush(self.pending, self.work.frames.index(video))
        self.states[video] = state


class _FreeSlots:
    """Idle workers by node; nodes and workers in the order given."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.by_node: dict[str, list[Slot]] = {}
        for slot in reversed(slots):
            self.by_node.setdefault(slot.node, []).append(slot)
        self.num_slots = len(slots)

    def take(self, node: str | None) -> Slot:
        """Take a worker of `node`, or if that has none, of another."""
        if node not in self.by_node:
            node = next(reversed(self.by_node))
        slots = self.by_node[node]
        slot = slots.pop()
        if not slots:
            del self.by_node[node]
        self.num_slots -= 1
        return slot


class Schedule:
    """The order of work for a story's scenes.

    With `retain` at most `live_scenes` identity caches lie on one node. A frame video may start
    as soon as its identity video has; it trails it. With `window` an identity video and as many
    frame videos as there are other workers, a wave, start at the same time.

    A report about a video that is over changes nothing: it comes from a worker that was given up.
    """

    def __init__(self, scenes: Sequence[SceneWork], *, policy: Policy, live_scenes: int) -> None:
        self._policy, self._live_scenes = policy, live_scenes
        self._scenes = [_new_scene(index, work, policy) for index, work in enumerate(scenes)]
        self._by_id = {scene.work.id: scene for scene in self._scenes}
        self._unfinished = {scene.index for scene in self._scenes if not scene.is_over}
        self._live: dict[int, _Scene] = {}
        self._caches: dict[str, int] = {}  # identity caches on each node
        # Heaps of scenes. They may name a scene that no longer belongs there: it is dropped when
        # it comes up.
        self._waiting = [scene.index for scene in self._scenes]
        self._restarts: list[int] = []  # live, and the identity video is pending
        self._ready: list[int] = []  # live, and frame videos are pending
        self._ready_on: dict[str, list[int]] = {}  # by the node that the cache is, or was, on

    @property
    def is_over(self) -> bool:
        """Whether every video is done or failed."""
        return not self._unfinished

    def scene_over(self, scene: str) -> bool:
        """Whether every video of a scene is done or failed, so that its cache can go."""
        return self._by_id[scene].is_over

    def state(self, scene: str, video: str) -> VideoState:
        """Return the state of a video."""
        return self._by_id[scene].states[video]

    def losses(self, scene: str, video: str) -> int:
        """Return how often an attempt at a video was lost."""
        return self._by_id[scene].losses.get(video, 0)

    def assign(self, idle: Sequence[Slot], num_workers: int) -> list[Assignment]:
        """Return what to start now. It counts as running from then on.

        `num_workers` are all that live, the busy ones too. First come identity videos that others
        wait for, then frame videos of live scenes, first those whose cache is on the worker's
        node, then new scenes in story order. A wave starts when enough workers are idle for all
        of it; with `window` nothing but an identity video can start on a single worker.
        """
        free = _FreeSlots([slot for slot in idle if slot.kind != "identity"])
        # The same workers, unless one worker renders all identity videos and nothing else.
        is_split = any(slot.kind != "any" for slot in idle)
        owned = [slot for slot in idle if slot.kind == "identity"]
        identity_free = _FreeSlots(owned) if is_split else free
        started: list[Assignment] = []
        while identity_free.num_slots and (scene := self._top(self._restarts, _awaits_identity)):
            started.append(self._start_identity(scene, identity_free.take(scene.node)))
        for node in list(free.by_node):
            ready = self._ready_on.get(node, [])
            while node in free.by_node and (scene := self._top(ready, _has_ready_frames)):
                started.append(_start_frame(scene, free.take(node)))
        while free.num_slots or identity_free.num_slots:
            scene = self._top(self._ready, _has_ready_frames)
            if scene and free.num_slots:
                started.append(_start_frame(scene, free.take(scene.node)))
                continue
            scene = self._top(self._waiting, lambda s: not (s.is_live or s.is_over))
            if scene is None:
                break
            wave = self._start_scene(scene, identity_free, free, num_workers)
            if wave is None:
                break
            started += wave
        return started

    def done(self, scene: str, video: str) -> None:
        """Note that a video was rendered."""
        found = self._by_id[scene]
        if found.states[video] in ("pending", "running"):
            found.is_rendered |= video == IDENTITY_ID
            self._end(found, video, "done")

    def failed(self, scene: str, video: str) -> None:
        """Note that a video cannot be rendered. It is not tried again.

        With an identity video all pending frame videos of its scene fail. Those running stay so:
        they wait for what will not come, and the caller ends them.
        """
        found = self._by_id[scene]
        if found.states[video] in ("pending", "running"):
            self._end(found, video, "failed")

    def lost(self, scene: str, video: str) -> bool:
        """Queue a video again whose worker died. Returns False if it was tried often enough.

        In that case it has failed, and with an identity video all that need it.
        """
        found = self._by_id[scene]
        if found.states[video] == "running":
            self._lose(found, video)
        return found.states[video] != "failed"

    def identity_lost(self, scene: str) -> bool:
        """Render an identity video again whose cache is gone, if a frame video still needs it.

        Returns False if it was tried often enough. While it is rendered anyway nothing changes:
        every frame video that misses the cache may report the loss.
        """
        found = self._by_id[scene]
        if found.identity == "done" and (found.num_pending or found.running):
            found.is_retained = self._policy == "retain"  # a cache from files had no need of it
            self._lose(found, IDENTITY_ID)
        return found.identity != "failed"

    def preempt(self, scene: str) -> str | None:
        """Name a running frame video to end, so that its worker renders the identity video.

        None if the identity video is not pending, or another video runs that does not wait for
        its own identity video: its worker comes free. The frame video named, the last one that
        was started, is pending again; that is no attempt.
        """
        found = self._by_id[scene]
        others = (live for live in self._live.values() if live.identity != "pending")
        if not _awaits_identity(found) or not found.running or any(o.is_running for o in others):
            return None
        video = next(reversed(found.running))
        found.move(video, "pending")
        self._settle(found)
        return video

    def _top(self, heap: list[int], belongs: Callable[[_Scene], bool]) -> _Scene | None:
        """Return the first scene of a heap that still belongs there; drop those before it."""
        while heap:
            scene = self._scenes[heap[0]]
            if belongs(scene):
                return scene
            heappop(heap)
        return None

    def _start_scene(
        self, scene: _Scene, identity_free: _FreeSlots, free: _FreeSlots, num_workers: int
    ) -> list[Assignment] | None:
        """Make a scene live, or return None if that needs more idle workers or more room."""
        if scene.is_retained and scene.identity == "done":
            self._make_live(scene, None)
            return []
        if not identity_free.num_slots:
            return None
        if scene.is_retained:
            node = self._roomiest(identity_free)
            if node is None:
                return None
            return [self._start_identity(scene, identity_free.take(node))]
        num_frames = min(scene.num_pending, num_workers - 1)
        num_free = free.num_slots - (identity_free is free)
        if num_free < num_frames or (scene.num_pending and not num_frames):
            return None
        if scene.identity == "done":  # by another wave; this one has its own attempts
            scene.losses.pop(IDENTITY_ID, None)
        by_node = identity_free.by_node
        node = max(reversed(by_node), key=lambda name: len(by_node[name]))
        wave = [self._start_identity(scene, identity_free.take(node))]
        return wave + [_start_frame(scene, free.take(node)) for _ in range(num_frames)]

    def _roomiest(self, free: _FreeSlots) -> str | None:
        """Return the node with the fewest identity caches, or None if all are full."""
        node = min(reversed(free.by_node), key=lambda name: self._caches.get(name, 0))
        return node if self._caches.get(node, 0) < self._live_scenes else None

    def _start_identity(self, scene: _Scene, slot: Slot) -> Assignment:
        scene.move(IDENTITY_ID, "running")
        self._make_live(scene, slot.node)
        return Assignment(slot.worker, scene.work.id, IDENTITY_ID)

    def _make_live(self, scene: _Scene, node: str | None) -> None:
        scene.is_live = True
        self._live[scene.index] = scene
        self._place(scene, node)
        self._settle(scene)

    def _place(self, scene: _Scene, node: str | None) -> None:
        """Count the identity cache of a scene where it is now, and not where it was."""
        if scene.node is not None:
            self._caches[scene.node] -= 1
        scene.node = node
        if node is not None:
            self._caches[node] = self._caches.get(node, 0) + 1

    def _lose(self, scene: _Scene, video: str) -> None:
        attempts = IDENTITY_ATTEMPTS if video == IDENTITY_ID else FRAME_ATTEMPTS
        scene.losses[video] = scene.losses.get(video, 0) + 1
        is_last = scene.losses[video] >= attempts or scene.identity == "failed"
        self._end(scene, video, "failed" if is_last else "pending")

    def _end(self, scene: _Scene, video: str, state: VideoState) -> None:
        scene.move(video, state)
        if scene.identity == "failed":
            for frame in scene.work.frames:
                if scene.states[frame] == "pending":
                    scene.move(frame, "failed")
        self._settle(scene)

    def _settle(self, scene: _Scene) -> None:
        """Put a scene on the heaps where it belongs after any change."""
        unneeded = scene.is_rendered and not (scene.num_pending or scene.running)
        if unneeded and scene.identity == "pending":
            scene.move(IDENTITY_ID, "done")  # its cache is gone, and nobody reads it any more
        if scene.is_live and (scene.is_over or not (scene.is_retained or scene.is_running)):
            scene.is_live = False
            del self._live[scene.index]
            self._place(scene, None)
            heappush(self._waiting, scene.index)
        if scene.is_over:
            self._unfinished.discard(scene.index)
        if _awaits_identity(scene):
            heappush(self._restarts, scene.index)
        if _has_ready_frames(scene):
            heappush(self._ready, scene.index)
            if scene.node is not None:
                heappush(self._ready_on.setdefault(scene.node, []), scene.index)


def _new_scene(index: int, work: SceneWork, policy: Policy) -> _Scene:
    identity: VideoState = "pending" if work.needs_identity else "done"
    return _Scene(
        index=index,
        work=work,
        is_retained=policy == "retain" or not work.needs_identity,
        states={IDENTITY_ID: identity, **dict.fromkeys(work.frames, "pending")},
        pending=list(range(len(work.frames))),
        num_pending=len(work.frames),
        is_rendered=not work.needs_identity,
    )


def _start_frame(scene: _Scene, slot: Slot) -> Assignment:
    video = scene.pop_frame()
    scene.move(video, "running")
    return Assignment(slot.worker, scene.work.id, video)


def _awaits_identity(scene: _Scene) -> bool:
    return scene.is_live and scene.identity == "pending"


def _has_ready_frames(scene: _Scene) -> bool:
    return scene.is_live and scene.is_retained and scene.num_pending > 0
