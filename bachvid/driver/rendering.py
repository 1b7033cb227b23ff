"""Renders one story into one run directory, keeps what is finished and retries what was lost.

It knows no tensor and no model: a pool of workers renders the videos, in the order of
`bachvid.scheduling.schedule`, and `bachvid.driver.writer` writes them.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping

from bachvid.driver.events import (
    Event,
    FrameStep,
    IdentityStep,
    Lost,
    Published,
    Queued,
    Started,
    VideoEvent,
)
from bachvid.driver.local_pool import LocalPool
from bachvid.driver.writer import Files, Writer, done_event
from bachvid.engine.results import RunStep
from bachvid.errors import WorkerError
from bachvid.output.files import IdentityPicture, contact_sheet, read_identity, wanted_files
from bachvid.output.run_directory import RunDirectory
from bachvid.planning.plan import RenderPlan, ScenePlan
from bachvid.scheduling.pool import (
    Broken,
    CacheLost,
    Finished,
    Job,
    JobLost,
    JobMessage,
    Message,
    Pool,
    Previewed,
    Recorded,
    Stepped,
    WorkerLost,
    WorkerPlaced,
)
from bachvid.scheduling.schedule import SceneWork, Schedule
from bachvid.units import pluralize

logger = logging.getLogger(__name__)


class Rendering:
    """Renders one story into one run directory."""

    def __init__(self, plan: RenderPlan, run: RunDirectory, cancelled: threading.Event) -> None:
        self._plan, self._run, self._cancelled = plan, run, cancelled
        self._writer = Writer(plan, run)
        self._known = {  # what the latents of a video must be, and what they were made with
            key: (record.latents_sha256, record.provenance)
            for key, record in run.contents.records.items()
        }
        self._todo = {scene.scene.id: self._missing(scene) for scene in plan.scenes}  # files
        self._identities: dict[str, IdentityPicture] = {}  # of scenes that are not over
        here = LocalPool(plan)
        self._pool: Pool = here
        self._schedule = self._new_schedule(here)
        self._early: dict[str, list[Finished]] = {}  # frame videos that wait for theirs
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
                    record = self._run.record(scene.scene.id, video.id)
                    assert record is not None
                    yield done_event(self._run, record, is_resumed=True)
        if not self._schedule.is_over:
            yield from self._render()
        self._writer.mend_sheets(self._plan.scenes)
        yield from self._writer.finish()

    def close(self) -> None:
        """End the running jobs, write what has been rendered, and write the manifest."""
        try:
            self._pool.close()
        finally:
            self._writer.close()
            self._run.write_manifest()

    def _missing(self, scene: ScenePlan) -> dict[str, Files]:
        """Name the files to write, for each video that lacks any."""
        missing: dict[str, Files] = {}
        for video in scene.videos:
            wanted = wanted_files(self._run, self._plan, scene=scene.scene.id, video=video.id)
            paths = self._run.missing(scene.scene.id, video.id, list(wanted.values()))
            if paths:
                missing[video.id] = {k: path for k, path in wanted.items() if path in paths}
        return missing

    def _new_schedule(self, here: LocalPool) -> Schedule:
        """Return a schedule of the scenes that lack any file.

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
        for message in self._pool.encode([job.video.prompt for job in jobs.values()]):
            yield from self._heard(message)
        while not (self._schedule.is_over or self._cancelled.is_set()):
            for given in self._schedule.assign(self._pool.idle, self._pool.num_workers):
                job = jobs[given.scene, given.video]
                self._pool.start(given.worker, job)
                yield from self._tell(job, Started(given.scene, given.video, given.worker))
            self._make_room(jobs)
            for message in self._pool.wait():
                yield from self._heard(message)
            yield from self._writer.written()

    def _make_room(self, jobs: Mapping[tuple[str, str], Job]) -> None:
        """Make room for a lost identity video if every worker holds a video that waits for it."""
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
        """Note a message of a worker."""
        match message:
            case WorkerPlaced() | WorkerLost():
                yield message
            case _:
                for event in self._heard_of(message.job, message):
                    yield from self._tell(message.job, event)
                self._end_scene(message.job.scene)

    def _heard_of(self, job: Job, message: JobMessage) -> Iterator[VideoEvent]:
        """Note a message of a worker about its job."""
        scene, schedule = job.scene.scene.id, self._schedule
        match message:
            case Stepped():
                yield self._step_event(job, message.step)
            case Previewed():
                self._writer.preview(job, message.frames)
            case Recorded():
                yield Published(scene, message.nbytes)
            case Finished() if not job.is_identity and scene not in self._identities:
                self._early.setdefault(scene, []).append(message)
            case Finished():
                if job.is_identity:
                    seen = message.rendered
                    self._identities[scene] = IdentityPicture(seen.frames, seen.foreground)
                self._finish(message)
                for early in self._early.pop(scene, []) if job.is_identity else []:
                    self._finish(early)
            case Broken():
                self._fail(job, message.error)
            case JobLost() | CacheLost():
                logger.warning("lost scene=%s video=%s: %s", scene, job.video.id, message.reason)
                yield Lost(scene, job.video.id, message.reason)
                self._lost.add(scene)
                if not schedule.lost(scene, job.video.id):
                    times = pluralize(schedule.losses(scene, job.video.id), "time")
                    self._fail(job, f"was lost {times}: {message.reason}")
                if isinstance(message, CacheLost) and not schedule.identity_lost(scene):
                    identity = Job(job.scene, job.scene.identity)
                    self._fail(identity, f"what it recorded was lost: {message.reason}")

    def _tell(self, job: Job, event: VideoEvent) -> Iterator[Event]:
        """Yield an event, or have the writer hold it behind an earlier one of the same video."""
        if not self._writer.hold(job, event):
            yield event

    def _finish(self, finished: Finished) -> None:
        """Have a rendered video written; fail it if an earlier render of it was another one."""
        job, scene = finished.job, finished.job.scene.scene.id
        found = (finished.rendered.latents_sha256, finished.provenance)
        before, provenance = self._known.setdefault((scene, job.video.id), found)
        if before != found[0]:
            self._fail(
                job,
                f"{scene}/{job.video.id} does not come out as it did before (latents "
                f"{found[0][:12]}, were {before[:12]}): the same weights, versions, device and "
                f"model.threads give the same video; it was made with "
                f"{json.dumps(dict(provenance))}. Restore these, or render into another folder",
            )
            return
        # An identity video that was run again has no files left to write.
        files = self._todo[scene].pop(job.video.id, {})
        self._writer.video(finished, files, self._identities[scene])
        self._schedule.done(scene, job.video.id)

    def _fail(self, job: Job, error: str) -> None:
        """Give up a video; with an identity video all that wait for it."""
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
                self._writer.failure(Job(scene, video), error)

    def _end_scene(self, scene: ScenePlan) -> None:
        """Write the sheet of a scene that is over, and free its cache."""
        name = scene.scene.id
        if not self._schedule.scene_over(name) or name in self._ended:
            return
        self._ended.add(name)
        self._pool.forget(name)
        self._identities.pop(name, None)
        self._early.pop(name, None)
        self._writer.end_scene(scene)

    def _step_event(self, job: Job, done: RunStep) -> VideoEvent:
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
