"""One story on its way into one run directory: what is kept, and what is tried again.

It knows no tensor and no model: videos are rendered by a pool of workers, in the order that
`bachvid.scheduling.schedule` says.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from bachvid.driver.events import (
    Done,
    Event,
    Failed,
    FrameStep,
    IdentityStep,
    Preview,
    Published,
    Queued,
)
from bachvid.driver.local_pool import LocalPool
from bachvid.engine.results import Frames
from bachvid.engine.results import RunStep
from bachvid.errors import WorkerError
from bachvid.output.files import (
    IdentityPicture,
    contact_sheet,
    read_identity,
    wanted_files,
    write_contact_sheet,
    write_files,
    write_preview,
)
from bachvid.output.journal import VideoRecord
from bachvid.output.run_directory import RunDirectory
from bachvid.output.sheets import sheet_tiles
from bachvid.planning.plan import RenderPlan, ScenePlan, VideoPlan
from bachvid.scheduling.pool import (
    Broken,
    CacheLost,
    Finished,
    Job,
    Message,
    Pool,
    Previewed,
    Recorded,
    Stepped,
    WorkerLost,
)
from bachvid.scheduling.schedule import SceneWork, Schedule

logger = logging.getLogger(__name__)
Files = Mapping[str, Path]  # by kind


class Rendering:
    """One story on its way into one run directory."""

    def __init__(self, plan: RenderPlan, run: RunDirectory, cancelled: threading.Event) -> None:
        self._plan, self._run, self._cancelled = plan, run, cancelled
        self._todo = {scene.scene.id: self._missing(scene) for scene in plan.scenes}  # files
        self._identities: dict[str, IdentityPicture] = {}  # of scenes that are not over
        here = LocalPool(plan)
        self._pool: Pool = here
        self._schedule = self._new_schedule(here)
        self._early: dict[str, list[Finished]] = {}  # frame videos that wait for theirs
        self._tiles: dict[str, dict[str, Frames]] = {}
        self._lost: set[str] = set()  # scenes that lost a worker or their cache
        self._failed: set[tuple[str, str]] = set()
        self._ended: set[str] = set()

    def events(self) -> Iterator[Event]:
        """Render all scenes."""
        for scene in self._plan.scenes:
            for video in scene.videos:
                if video.id in self._todo[scene.scene.id]:
                    yield Queued(scene.scene.id, video.id)
                else:
                    yield self._done(scene, video, is_resumed=True)
        if not self._schedule.is_over:
            yield from self._render()
        for scene in self._plan.scenes:  # a crash may have come between video and sheet
            if not contact_sheet(self._run, scene).exists():
                write_contact_sheet(self._run, scene, {})

    def close(self) -> None:
        """End what runs, and leave a manifest of what there is."""
        self._pool.close()
        self._run.write_manifest()

    def _missing(self, scene: ScenePlan) -> dict[str, Files]:
        """Name the files to write, for each video that lacks any."""
        missing: dict[str, Files] = {}
        for video in scene.videos:
            wanted = wanted_files(
                self._run, self._plan.config, scene=scene.scene.id, video=video.id
            )
            paths = self._run.missing(scene.scene.id, video.id, list(wanted.values()))
            if paths:
                missing[video.id] = {k: path for k, path in wanted.items() if path in paths}
        return missing

    def _new_schedule(self, here: LocalPool) -> Schedule:
        """Plan the work on scenes that lack anything.

        Any of their videos needs the identity's keys and values; these are rendered for it again,
        unless they were kept as files.
        """
        work = []
        for scene in self._plan.scenes:
            name, todo = scene.scene.id, self._todo[scene.scene.id]
            if not todo:
                continue
            frames = tuple(video.id for video in scene.frames if video.id in todo)
            identity = Job(scene, scene.identity)
            has_cache = scene.identity.id not in todo and here.has_cache(identity)
            if has_cache:
                self._identities[name] = read_identity(self._run, scene)
            work.append(SceneWork(name, frames, needs_identity=not has_cache))
        execution = self._plan.execution
        if execution is None:
            return Schedule(work, policy="retain", live_scenes=1)
        return Schedule(work, policy=execution.policy, live_scenes=execution.live_scenes)

    def _render(self) -> Iterator[Event]:
        """Keep all workers busy until every video is done or has failed."""
        if self._plan.execution is not None:
            from bachvid.ray_backend.pool import RayPool

            self._pool = RayPool(self._plan, self._plan.execution)
        jobs: dict[tuple[str, str], Job] = {}
        for scene in self._plan.scenes:
            if self._todo[scene.scene.id]:
                jobs |= {(scene.scene.id, video.id): Job(scene, video) for video in scene.videos}
                contact_sheet(self._run, scene).unlink(missing_ok=True)  # it shows the old state
        self._pool.encode([job.video.prompt for job in jobs.values()])
        while not (self._schedule.is_over or self._cancelled.is_set()):
            for given in self._schedule.assign(self._pool.idle, self._pool.num_workers):
                self._pool.start(given.worker, jobs[given.scene, given.video])
            self._make_room(jobs)
            for message in self._pool.wait():
                yield from self._heard(message)
                self._end_scene(message.job.scene)

    def _make_room(self, jobs: Mapping[tuple[str, str], Job]) -> None:
        """Let a lost identity video go first, where all workers hold videos that wait for it."""
        if len(self._pool.idle) == self._pool.num_workers:  # nothing was found for any of them
            raise WorkerError(
                f"the cluster has too few workers left, {self._pool.num_workers}, to go on: a "
                f"window needs one for the identity video and one for a frame video, and so do "
                f"gangs of two sizes. What is done is kept; render again with more, or with "
                f"cache.policy=retain and parallel.identity_gpus = parallel.gpus_per_frame_actor"
            )
        if self._pool.idle or self._pool.is_growing:
            return
        for scene in self._lost:
            video = self._schedule.preempt(scene)
            if video is not None:
                self._pool.abort(jobs[scene, video])

    def _heard(self, message: Message) -> Iterator[Event]:
        """Note what a worker says."""
        job, schedule = message.job, self._schedule
        scene = job.scene.scene.id
        match message:
            case Stepped():
                yield self._step_event(job, message.step)
            case Previewed():
                path = self._run.file(scene, "previews", f"{job.video.id}.png")
                write_preview(path, job.video, message.frames)
                yield Preview(scene, job.video.id, path)
            case Recorded():
                yield Published(scene, message.nbytes)
            case Finished() if not job.is_identity and scene not in self._identities:
                self._early.setdefault(scene, []).append(message)
            case Finished():
                if job.is_identity:
                    seen = message.rendered
                    self._identities[scene] = IdentityPicture(seen.frames, seen.foreground)
                yield from self._finish(message)
                for early in self._early.pop(scene, []) if job.is_identity else []:
                    yield from self._finish(early)
            case Broken():
                yield from self._fail(job, message.error)
            case WorkerLost() | CacheLost():
                logger.warning("lost scene=%s video=%s: %s", scene, job.video.id, message.reason)
                self._lost.add(scene)
                if not schedule.lost(scene, job.video.id):
                    yield from self._fail(job, f"was lost again and again: {message.reason}")
                if isinstance(message, CacheLost) and not schedule.identity_lost(scene):
                    identity = Job(job.scene, job.scene.identity)
                    yield from self._fail(identity, f"its keys and values: {message.reason}")

    def _finish(self, finished: Finished) -> Iterator[Event]:
        """Keep a rendered video, once that of its identity is here."""
        job, scene = finished.job, finished.job.scene
        name = scene.scene.id
        try:
            self._keep(finished, self._identities[name])
        except WorkerError as error:
            yield from self._fail(job, str(error))
            return
        self._schedule.done(name, job.video.id)
        self._tiles.setdefault(name, {})[job.video.id] = sheet_tiles(finished.rendered.frames)
        if self._todo[name].pop(job.video.id, None):  # not an identity video that was run again
            yield self._done(scene, job.video, is_resumed=False)

    def _fail(self, job: Job, error: str) -> Iterator[Event]:
        """Return a video up; with an identity video all that wait for it."""
        scene, name = job.scene, job.scene.scene.id
        for video in scene.videos if job.is_identity else [job.video]:
            is_wanted = video.id in self._todo[name]
            if (name, video.id) in self._failed or not (is_wanted or video is scene.identity):
                continue
            if self._schedule.state(name, video.id) == "done":
                continue
            self._failed.add((name, video.id))
            self._schedule.failed(name, video.id)
            self._pool.abort(Job(scene, video))
            if is_wanted:
                logger.warning("video failed scene=%s video=%s", name, video.id)
                self._run.commit_failure(name, video.id, error)
                yield Failed(name, video.id, error)

    def _end_scene(self, scene: ScenePlan) -> None:
        """Write what tells of a scene once it is over, and let go of it."""
        name = scene.scene.id
        if not self._schedule.scene_over(name) or name in self._ended:
            return
        self._ended.add(name)
        self._pool.forget(name)
        self._identities.pop(name, None)
        self._early.pop(name, None)
        write_contact_sheet(self._run, scene, self._tiles.pop(name, {}))
        self._run.write_manifest()

    def _step_event(self, job: Job, done: RunStep) -> Event:
        """Count steps over all runs of a phase, as a caller sees them."""
        scene, video = job.scene.scene.id, job.video.id
        runs = self._plan.runs(video)
        lengths = [len(run.steps) for run in runs]
        step = sum(lengths[: done.run]) + runs[done.run].steps.index(done.step)
        if job.is_identity:
            return IdentityStep(scene, step, sum(lengths))
        before = sum(lengths[:-1])
        if step < before:
            return FrameStep(scene, video, "pre_pass", step, before)
        return FrameStep(scene, video, "main_run", step - before, lengths[-1])

    def _keep(self, finished: Finished, identity: IdentityPicture) -> None:
        """Write a video's missing files and journal it. Raises WorkerError if it is another."""
        scene, video, rendered = finished.job.scene, finished.job.video, finished.rendered
        files = self._todo[scene.scene.id].get(video.id, {})
        record = self._run.record(scene.scene.id, video.id)
        if record is not None and record.latents_sha256 != rendered.latents_sha256:
            raise WorkerError(
                f"{scene.scene.id}/{video.id} does not come out as it did before (latents "
                f"{rendered.latents_sha256[:12]}, were {record.latents_sha256[:12]}): the same "
                f"weights, versions, device and model.threads give the same video; it was made "
                f"with {json.dumps(dict(record.made_with))}. Restore these, or render into "
                f"another folder"
            )
        if not files:
            return
        start = time.perf_counter()
        config = self._plan.config
        written = write_files(
            files,
            config=config,
            temporal_ratio=self._plan.facts.temporal_ratio,
            video=video,
            rendered=rendered,
            identity=identity,
            config_sha256=self._run.header.config_hash,
        )
        digests = {self._run.relative(path): digest for path, digest in written.items()}
        if record is not None:
            self._run.commit(replace(record, files={**record.files, **digests}))
            return
        self._run.commit(
            VideoRecord(
                scene=scene.scene.id,
                video=video.id,
                prompt=video.prompt.text,
                seed=video.seed,
                latents_sha256=rendered.latents_sha256,
                frames_sha256=rendered.frames_sha256,
                files=digests,
                seconds={**rendered.seconds, "write": round(time.perf_counter() - start, 3)},
                cache_bytes=self._plan.cache_bytes,
                recoveries=rendered.recoveries,
                made_with=finished.made_with,
            )
        )

    def _done(self, scene: ScenePlan, video: VideoPlan, *, is_resumed: bool) -> Done:
        record = self._run.record(scene.scene.id, video.id)
        assert record is not None
        return Done(
            scene=scene.scene.id,
            video=video.id,
            path=self._run.file(scene.scene.id, f"{video.id}.mp4"),
            seconds=sum(record.seconds.values()),
            recoveries=tuple(record.recoveries),
            is_resumed=is_resumed,
        )
