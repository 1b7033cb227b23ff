"""The order of work: what starts where, and that every video ends whatever dies."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bachvid.inputs.choices import Policy
from bachvid.inputs.story import IDENTITY_ID
from bachvid.scheduling.schedule import (
    FRAME_ATTEMPTS,
    IDENTITY_ATTEMPTS,
    Assignment,
    SceneWork,
    Schedule,
    Slot,
)

Started = list[tuple[int, str, str]]


def work(*num_frames: int) -> list[SceneWork]:
    """Return scenes s0, s1, ... with frame videos f0, f1, ..."""
    return [
        SceneWork(f"s{i}", tuple(f"f{n}" for n in range(count)))
        for i, count in enumerate(num_frames)
    ]


def slots(*nodes: str, is_split: bool = False) -> list[Slot]:
    if not is_split:
        return [Slot(worker, node) for worker, node in enumerate(nodes)]
    return [
        Slot(worker, node, "frame" if worker else "identity") for worker, node in enumerate(nodes)
    ]


def started(assignments: list[Assignment]) -> Started:
    return [(one.worker, one.scene, one.video) for one in assignments]


def start(schedule: Schedule, *nodes: str, num_workers: int | None = None) -> Started:
    return started(schedule.assign(slots(*nodes), num_workers or len(nodes)))


def test_frame_videos_start_with_their_identity_video_in_story_order() -> None:
    schedule = Schedule(work(3), policy="retain", live_scenes=1)
    assert start(schedule, "a", "a", "a", num_workers=4) == [
        (0, "s0", IDENTITY_ID),
        (1, "s0", "f0"),
        (2, "s0", "f1"),
    ]
    assert start(schedule, "a", num_workers=4) == [(0, "s0", "f2")]
    assert start(schedule, "a", num_workers=4) == []


def test_one_worker_renders_scene_by_scene() -> None:
    schedule = Schedule(work(1, 1), policy="retain", live_scenes=1)
    order = []
    while not schedule.is_over:
        ((_, scene, video),) = start(schedule, "a")
        order.append(f"{scene}/{video}")
        schedule.done(scene, video)
    assert order == ["s0/identity", "s0/f0", "s1/identity", "s1/f0"]


def test_a_scene_waits_until_a_node_has_room_for_its_cache() -> None:
    schedule = Schedule(work(1, 1, 1), policy="retain", live_scenes=1)
    assert start(schedule, "a", "a", "a", "b") == [
        (0, "s0", IDENTITY_ID),
        (1, "s0", "f0"),
        (3, "s1", IDENTITY_ID),  # the node without a cache
        (2, "s1", "f0"),
    ]
    schedule.done("s0", IDENTITY_ID)
    assert start(schedule, "a", num_workers=4) == []
    schedule.done("s0", "f0")
    assert schedule.scene_over("s0")
    assert start(schedule, "b", num_workers=4) == []
    assert start(schedule, "a", num_workers=4) == [(0, "s2", IDENTITY_ID)]


def test_a_worker_takes_a_frame_video_whose_cache_is_on_its_node() -> None:
    schedule = Schedule(work(2, 2), policy="retain", live_scenes=1)
    schedule.assign([Slot(0, "a")], 4)
    schedule.assign([Slot(1, "a"), Slot(2, "a")], 4)
    schedule.assign([Slot(3, "b")], 4)
    for frame in ("f0", "f1"):
        assert schedule.state("s0", frame) == "running"
        schedule.lost("s0", frame)
    assert start(schedule, "b", "a", "b") == [
        (0, "s1", "f0"),
        (2, "s1", "f1"),
        (1, "s0", "f0"),
    ]
    assert start(schedule, "b") == [(0, "s0", "f1")]  # of another node rather than nothing


def test_a_cache_at_hand_needs_no_identity_video() -> None:
    for policy in ("retain", "window"):
        schedule = Schedule([SceneWork("s", ("f",), False)], policy=policy, live_scenes=1)
        assert start(schedule, "a") == [(0, "s", "f")]
        schedule.done("s", "f")
        assert schedule.is_over


def test_a_cache_at_hand_that_is_damaged_is_rendered() -> None:
    schedule = Schedule([SceneWork("s", ("f", "g"), False)], policy="window", live_scenes=1)
    assert start(schedule, "a", num_workers=2) == [(0, "s", "f")]
    assert schedule.identity_lost("s")
    assert schedule.identity_lost("s")  # by the other frame video: the same loss
    assert start(schedule, "a", num_workers=2) == [(0, "s", IDENTITY_ID)]


def test_nothing_to_do_is_over_at_once() -> None:
    assert Schedule([], policy="retain", live_scenes=1).is_over
    schedule = Schedule([SceneWork("s", (), False)], policy="retain", live_scenes=1)
    assert schedule.is_over
    assert start(schedule, "a") == []


def test_a_wave_starts_whole_or_not_at_all() -> None:
    schedule = Schedule(work(2, 1, 0), policy="window", live_scenes=1)
    assert start(schedule, "a", "a", num_workers=6) == []
    assert start(schedule, "a", "b", "b", "a", "b", "a") == [
        (1, "s0", IDENTITY_ID),  # on the node where most of the wave is at home
        (2, "s0", "f0"),
        (4, "s0", "f1"),
        (0, "s1", IDENTITY_ID),
        (3, "s1", "f0"),
        (5, "s2", IDENTITY_ID),
    ]


def test_more_frame_videos_than_workers_take_several_waves_each_with_its_identity() -> None:
    schedule = Schedule(work(3), policy="window", live_scenes=1)
    waves = []
    while not schedule.is_over:
        wave = start(schedule, "a", "a", "a")
        waves.append([video for _, _, video in wave])
        for _, scene, video in wave:
            schedule.done(scene, video)
    assert waves == [[IDENTITY_ID, "f0", "f1"], [IDENTITY_ID, "f2"]]


def test_a_lone_worker_starts_no_wave_with_frame_videos() -> None:
    schedule = Schedule(work(0, 1), policy="window", live_scenes=1)
    assert start(schedule, "a") == [(0, "s0", IDENTITY_ID)]
    schedule.done("s0", IDENTITY_ID)
    assert start(schedule, "a") == []


def test_a_frame_video_lost_in_a_wave_joins_the_next_one() -> None:
    schedule = Schedule(work(2), policy="window", live_scenes=1)
    start(schedule, "a", "a", "a")
    assert schedule.lost("s0", "f0")
    schedule.done("s0", IDENTITY_ID)
    assert start(schedule, "a", "a", num_workers=3) == []  # its steps are gone
    schedule.done("s0", "f1")
    assert start(schedule, "a", "a", num_workers=3) == [(0, "s0", IDENTITY_ID), (1, "s0", "f0")]


@pytest.mark.parametrize("policy", ["retain", "window"])
def test_a_lost_identity_video_comes_first_and_its_frame_videos_wait(policy: Policy) -> None:
    schedule = Schedule(work(2, 1), policy=policy, live_scenes=2)
    start(schedule, "a", "a", "a")
    assert schedule.lost("s0", IDENTITY_ID)
    assert start(schedule, "b", num_workers=3) == [(0, "s0", IDENTITY_ID)]
    assert schedule.state("s0", "f0") == "running"


def test_a_cache_that_is_gone_is_rendered_again_if_somebody_reads_it() -> None:
    schedule = Schedule(work(1), policy="retain", live_scenes=1)
    start(schedule, "a", "a")
    schedule.done("s0", IDENTITY_ID)
    assert schedule.identity_lost("s0")
    assert start(schedule, "b", num_workers=2) == [(0, "s0", IDENTITY_ID)]
    schedule.done("s0", IDENTITY_ID)
    schedule.done("s0", "f0")
    assert schedule.identity_lost("s0")
    assert schedule.is_over


def test_a_cache_that_nobody_reads_any_more_is_not_waited_for() -> None:
    schedule = Schedule(work(1), policy="retain", live_scenes=1)
    start(schedule, "a", "a")
    schedule.done("s0", IDENTITY_ID)
    schedule.identity_lost("s0")
    schedule.done("s0", "f0")  # it had all it needs
    assert schedule.is_over
    assert start(schedule, "a") == []


def test_a_frame_video_is_tried_three_times() -> None:
    schedule = Schedule(work(1), policy="retain", live_scenes=1)
    start(schedule, "a")
    answers = []
    for _ in range(FRAME_ATTEMPTS):
        assert start(schedule, "a") == [(0, "s0", "f0")]
        answers.append(schedule.lost("s0", "f0"))
    assert answers == [True, True, False]
    assert schedule.state("s0", "f0") == "failed"


def test_an_identity_video_is_tried_twice_and_takes_its_frame_videos_along() -> None:
    schedule = Schedule(work(2, 1), policy="retain", live_scenes=1)
    start(schedule, "a", "a")
    assert schedule.lost("s0", IDENTITY_ID)
    assert start(schedule, "a", num_workers=2) == [(0, "s0", IDENTITY_ID)]
    assert not schedule.lost("s0", IDENTITY_ID)
    states = [schedule.state("s0", video) for video in (IDENTITY_ID, "f0", "f1")]
    assert states == ["failed", "running", "failed"]
    assert not schedule.scene_over("s0")
    assert not schedule.lost("s0", "f0")  # the caller ended it
    assert schedule.scene_over("s0")
    assert start(schedule, "a", "a") == [(0, "s1", IDENTITY_ID), (1, "s1", "f0")]


def test_every_wave_may_lose_its_identity_video_once() -> None:
    schedule = Schedule(work(2), policy="window", live_scenes=1)
    for frame in ("f0", "f1"):
        start(schedule, "a", "a")
        assert schedule.lost("s0", IDENTITY_ID)
        start(schedule, "a", num_workers=2)
        schedule.done("s0", IDENTITY_ID)
        schedule.done("s0", frame)
    assert schedule.is_over


def test_a_failure_is_not_tried_again() -> None:
    schedule = Schedule(work(2), policy="retain", live_scenes=1)
    start(schedule, "a", "a")
    schedule.failed("s0", "f0")
    assert start(schedule, "a", num_workers=2) == [(0, "s0", "f1")]
    schedule.failed("s0", IDENTITY_ID)
    schedule.done("s0", "f1")  # it had all it needs
    assert schedule.is_over
    assert schedule.state("s0", "f1") == "done"


def test_reports_that_come_too_late_change_nothing() -> None:
    schedule = Schedule(work(1), policy="retain", live_scenes=1)
    start(schedule, "a", "a")
    schedule.done("s0", "f0")
    assert schedule.lost("s0", "f0")
    schedule.failed("s0", "f0")
    assert schedule.state("s0", "f0") == "done"


def test_a_waiting_frame_video_makes_room_for_its_identity_video() -> None:
    schedule = Schedule(work(2, 1), policy="retain", live_scenes=2)
    start(schedule, "a", "a", "a")
    assert schedule.preempt("s0") is None  # the identity video is running
    schedule.lost("s0", IDENTITY_ID)
    assert schedule.preempt("s0") == "f1"
    assert start(schedule, "a", num_workers=2) == [(0, "s0", IDENTITY_ID)]
    for _ in range(FRAME_ATTEMPTS - 1):  # being preempted was no attempt
        assert start(schedule, "a", num_workers=3) == [(0, "s0", "f1")]
        assert schedule.lost("s0", "f1")


def test_nobody_makes_room_while_a_worker_will_come_free() -> None:
    schedule = Schedule(work(1, 0), policy="retain", live_scenes=2)
    start(schedule, "a", "a", "a")
    schedule.lost("s0", IDENTITY_ID)
    assert schedule.preempt("s0") is None  # s1/identity ends some time
    schedule.done("s1", IDENTITY_ID)
    assert schedule.preempt("s0") == "f0"


def test_of_two_kinds_one_worker_renders_the_identity_videos_and_goes_ahead() -> None:
    schedule = Schedule(work(2, 1), policy="retain", live_scenes=2)

    def run(*workers: int) -> Started:
        idle = [slot for slot in slots("a", "a", "b", is_split=True) if slot.worker in workers]
        return started(schedule.assign(idle, 3))

    assert run(1, 2) == []  # they wait for the one that renders identity videos
    assert run(0, 1, 2) == [(0, "s0", IDENTITY_ID), (1, "s0", "f0"), (2, "s0", "f1")]
    schedule.done("s0", IDENTITY_ID)
    assert run(0) == [(0, "s1", IDENTITY_ID)]
    schedule.done("s1", IDENTITY_ID)
    assert run(0) == []
    schedule.done("s0", "f1")
    assert run(0, 2) == [(2, "s1", "f0")]


def test_of_two_kinds_a_wave_takes_all_it_needs() -> None:
    schedule = Schedule(work(3), policy="window", live_scenes=1)
    both = slots("a", "a", "a", is_split=True)
    assert started(schedule.assign(both[:2], 3)) == []
    wave = [(0, "s0", IDENTITY_ID), (1, "s0", "f0"), (2, "s0", "f1")]
    assert started(schedule.assign(both, 3)) == wave
    for _, _, video in wave:
        schedule.done("s0", video)
    assert started(schedule.assign(both, 3)) == [(0, "s0", IDENTITY_ID), (1, "s0", "f2")]


@given(
    frames=st.lists(st.integers(0, 5), max_size=6),
    cached=st.integers(0, 2),
    nodes=st.lists(st.sampled_from("abc"), min_size=2, max_size=7),
    policy=st.sampled_from(["retain", "window"]),
    live_scenes=st.integers(1, 3),
    is_split=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=300)
def test_every_video_ends_whatever_is_lost(
    frames: list[int],
    cached: int,
    nodes: list[str],
    policy: Policy,
    live_scenes: int,
    is_split: bool,
    seed: int,
) -> None:
    """A driver in small: random workers finish, die, come back, and caches vanish."""
    rng = random.Random(seed)
    scenes = [
        SceneWork(scene.id, scene.frames, needs_identity=number >= cached)
        for number, scene in enumerate(work(*frames))
    ]
    schedule = Schedule(scenes, policy=policy, live_scenes=live_scenes)
    busy: dict[int, tuple[str, str]] = {}
    runs: Counter[tuple[str, str]] = Counter()
    losses: Counter[tuple[str, str]] = Counter()
    for _ in range(10_000):
        all_slots = slots(*nodes, is_split=is_split)
        idle = [slot for slot in all_slots if slot.worker not in busy]
        for one in schedule.assign(idle, len(nodes)):
            assert one.worker not in busy
            assert not is_split or (one.worker == 0) == (one.video == IDENTITY_ID)
            assert (one.scene, one.video) not in busy.values()
            scene = scenes[int(one.scene[1:])]
            if one.video != IDENTITY_ID:
                assert runs[one.scene, IDENTITY_ID] or not scene.needs_identity
            busy[one.worker] = (one.scene, one.video)
            runs[one.scene, one.video] += 1
        if schedule.is_over:
            break
        assert busy, "nothing runs, and nothing will"
        waiting = {scene for scene, _ in busy.values()}
        waiting = {scene for scene in waiting if schedule.state(scene, IDENTITY_ID) == "pending"}
        able = [worker for worker, (scene, _) in busy.items() if scene not in waiting]
        if not able:
            scene_id = rng.choice(sorted(waiting))
            frame = schedule.preempt(scene_id)
            assert frame is not None
            busy = {worker: job for worker, job in busy.items() if job != (scene_id, frame)}
            continue
        worker = rng.choice(able)
        scene_id, video = busy.pop(worker)
        event = rng.random()
        if event < 0.7:
            schedule.done(scene_id, video)
        elif event < 0.85:
            losses[scene_id, video] += 1
            assert schedule.lost(scene_id, video) or schedule.state(scene_id, video) == "failed"
        elif event < 0.9:
            schedule.failed(scene_id, video)
        else:
            busy[worker] = (scene_id, video)
            schedule.identity_lost(scene_id)
    assert schedule.is_over
    assert not busy
    for scene in scenes:
        assert schedule.scene_over(scene.id)
        for video in scene.frames:
            assert schedule.state(scene.id, video) in ("done", "failed")
            assert losses[scene.id, video] <= FRAME_ATTEMPTS
        waves = 1 if policy == "retain" else len(scene.frames) * FRAME_ATTEMPTS + 1
        assert runs[scene.id, IDENTITY_ID] <= IDENTITY_ATTEMPTS * waves
