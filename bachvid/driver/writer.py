"""Writes the results of a render into its run directory, in a thread of its own.

Encoding a video takes seconds, in which the driver's loop goes on giving jobs. Everything is
written in the order in which it was handed in, with the journal: the line of a video follows its
files. While a render runs nobody else changes its run directory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from bachvid.driver.events import Done, Failed, Preview, VideoEvent
from bachvid.engine.results import Frames
from bachvid.output.files import (
    IdentityPicture,
    contact_sheet,
    write_contact_sheet,
    write_files,
    write_preview,
)
from bachvid.output.journal import VideoRecord
from bachvid.output.run_directory import RunDirectory
from bachvid.output.sheets import sheet_tiles
from bachvid.planning.plan import RenderPlan, ScenePlan
from bachvid.scheduling.pool import Finished, Job

logger = logging.getLogger(__name__)

Files = Mapping[str, Path]  # by kind
VideoKey = tuple[str, str]  # scene, video

_MOST_WAITING = 4  # things to write, among them whole videos in memory; then the loop waits


class Writer:
    """The one thread that writes a run directory.

    What is handed in is written even if the render is cancelled or fails. An event comes back when
    its files are on the disk; an error of a write is raised in place of its event.
    """

    def __init__(self, plan: RenderPlan, run: RunDirectory) -> None:
        self._plan, self._run = plan, run
        self._tiles: dict[str, dict[str, Frames]] = {}  # of scenes that are not over
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bachvid-writer")
        self._room = threading.BoundedSemaphore(_MOST_WAITING)
        self._queue: deque[tuple[VideoKey | None, Future[VideoEvent | None]]] = deque()
        self._waiting: Counter[VideoKey] = Counter()  # events of each video in the queue

    def video(self, finished: Finished, files: Files, identity: IdentityPicture) -> None:
        """Write the `files` of a rendered video, and journal it."""
        self._hand_in(_key(finished.job), lambda: self._write_video(finished, files, identity))

    def failure(self, job: Job, error: str) -> None:
        """Journal that a video could not be rendered."""
        scene, video = _key(job)

        def write() -> Failed:
            self._run.commit_failure(scene, video, error)
            return Failed(scene, video, error)

        self._hand_in((scene, video), write)

    def preview(self, job: Job, frames: Frames) -> None:
        """Write a picture of the estimated video."""
        scene, video = _key(job)

        def write() -> Preview:
            path = self._run.file(scene, "previews", f"{video}.png")
            write_preview(path, job.video, frames)
            return Preview(scene, video, path)

        self._hand_in((scene, video), write)

    def end_scene(self, scene: ScenePlan) -> None:
        """Write the contact sheet of a scene whose videos have all been handed in."""

        def write() -> None:
            write_contact_sheet(self._run, scene, self._tiles.pop(scene.scene.id, {}))
            self._run.write_manifest()

        self._hand_in(None, write)

    def mend_sheets(self, scenes: Sequence[ScenePlan]) -> None:
        """Write missing contact sheets: a crash may have come between a video and its sheet."""

        def write() -> None:
            for scene in scenes:
                if not contact_sheet(self._run, scene).exists():
                    write_contact_sheet(self._run, scene, {})

        self._hand_in(None, write)

    def hold(self, job: Job, event: VideoEvent) -> bool:
        """Keep an event that must follow one of the same video which still waits for the disk.

        Returns False if none waits, so that the event can be yielded at once.
        """
        if not self._waiting[_key(job)]:
            return False
        told: Future[VideoEvent | None] = Future()
        told.set_result(event)
        self._append(_key(job), told)
        return True

    def written(self) -> Iterator[VideoEvent]:
        """Yield the events of what has been written by now."""
        while self._queue and self._queue[0][1].done():
            yield from self._take()

    def finish(self) -> Iterator[VideoEvent]:
        """Wait until everything is written, and yield the events."""
        while self._queue:
            yield from self._take()

    def close(self) -> None:
        """Wait until everything is written, and end the thread."""
        self._thread.shutdown()
        for _ in self.finish():  # nobody listens any more, but what failed must be raised
            pass

    def _hand_in(self, key: VideoKey | None, write: Callable[[], VideoEvent | None]) -> None:
        """Queue something to write; wait first, if much is queued."""
        self._room.acquire()

        def run() -> VideoEvent | None:
            try:
                return write()
            finally:
                self._room.release()

        self._append(key, self._thread.submit(run))

    def _append(self, key: VideoKey | None, future: Future[VideoEvent | None]) -> None:
        self._queue.append((key, future))
        if key is not None:
            self._waiting[key] += 1

    def _take(self) -> Iterator[VideoEvent]:
        """Yield the event of the queue's first entry, if it has one."""
        key, future = self._queue.popleft()
        if key is not None:
            self._waiting[key] -= 1
        event = future.result()
        if event is not None:
            yield event

    def _write_video(
        self, finished: Finished, files: Files, identity: IdentityPicture
    ) -> Done | None:
        """Write and journal a video; None if none of its files was missing."""
        scene, video, rendered = finished.job.scene, finished.job.video, finished.rendered
        name = scene.scene.id
        self._tiles.setdefault(name, {})[video.id] = sheet_tiles(rendered.frames)
        if not files:
            return None
        start = time.perf_counter()
        written = write_files(
            files,
            config=self._plan.config,
            temporal_ratio=self._plan.facts.temporal_ratio,
            video=video,
            rendered=rendered,
            identity=identity,
            config_sha256=self._run.header.config_hash,
        )
        digests = {self._run.relative(path): digest for path, digest in written.items()}
        record = self._run.record(name, video.id)
        if record is None:
            record = VideoRecord(
                scene=name,
                video=video.id,
                prompt=video.prompt.text,
                seed=video.seed,
                latents_sha256=rendered.latents_sha256,
                frames_sha256=rendered.frames_sha256,
                files=digests,
                seconds={**rendered.seconds, "write": round(time.perf_counter() - start, 3)},
                cache_bytes=self._plan.cache_bytes,
                recoveries=rendered.recoveries,
                provenance=finished.provenance,
            )
        else:
            record = replace(record, files={**record.files, **digests})
        self._run.commit(record)
        return done_event(self._run, record, is_resumed=False, waited=finished.waited)


def done_event(
    run: RunDirectory, record: VideoRecord, *, is_resumed: bool, waited: float = 0.0
) -> Done:
    """Return the event of a video that is in the run directory."""
    return Done(
        scene=record.scene,
        video=record.video,
        path=run.file(record.scene, f"{record.video}.mp4"),
        seconds=sum(record.seconds.values()),
        recoveries=tuple(record.recoveries),
        is_resumed=is_resumed,
        waited=waited,
    )


def _key(job: Job) -> VideoKey:
    return job.scene.scene.id, job.video.id
