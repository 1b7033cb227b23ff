"""StoryRenderer, the driver: what is rendered when, what is kept, and what the caller hears.

It knows no tensor and no model, and imports no torch: the rendering is done by the actors, here
in one thread of this process.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from bachvid.config import RenderConfig
from bachvid.errors import WorkerError
from bachvid.events import (
    Done,
    Event,
    Failed,
    FrameStep,
    IdentityStep,
    Phase,
    Published,
    Queued,
)
from bachvid.journal import VideoRecord
from bachvid.output import contact_sheet, run_header, wanted_files, write_contact_sheet, write_files
from bachvid.plan import RenderPlan, ScenePlan, VideoPlan, render_plan
from bachvid.rundir import RunDirectory, disk_errors
from bachvid.story import Story
from bachvid.video import Frames, sheet_tiles

if TYPE_CHECKING:
    from bachvid.actors import FrameVideoActor, ModelWorker, RenderedVideo
    from bachvid.cache import IdentityCache

__all__ = [  # the driver API: the renderer and what it says
    "Done",
    "Event",
    "Failed",
    "FrameStep",
    "IdentityStep",
    "Published",
    "Queued",
    "StoryRenderer",
]

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Files = Mapping[str, Path]  # by kind


class _Cancelled(BaseException):
    """Ends a render between two steps; no Exception, so that nobody takes it for a failure."""


class StoryRenderer:
    """Renders stories into a run directory. Use as a context manager.

    Example:
        with StoryRenderer(config, Path("runs/lighthouse")) as renderer:
            for event in renderer.stream(story):
                print(event)
    """

    def __init__(self, config: RenderConfig, out: Path) -> None:
        self._config = config
        self._out = out
        self._cancelled = threading.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bachvid-worker")

    def __enter__(self) -> StoryRenderer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown()

    def cancel(self) -> None:
        """End every stream after its current step. For any thread, and for signal handlers."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called, or a stream left early: videos may be missing."""
        return self._cancelled.is_set()

    def stream(self, story: Story, *, source: str = "story") -> Iterator[Event]:
        """Render what is missing of `story`, scene by scene, and yield what happens.

        A video that fails does not fail its siblings. Rendering into the same directory again
        renders what is missing. A video that lacks only a file, because the file was lost or
        `output` asks for more than before, is rendered again, must come out as it was, and only
        that file is written. `source` names the story in messages.

        Raises:
            ConfigError: the story or config cannot be rendered, or the directory is another's.
            ModelSupportError: bachvid cannot run this model.
            WorkerError: the run directory cannot be written.
        """
        plan = render_plan(story, self._config, source=source, download=True)
        with disk_errors(self._out), RunDirectory(self._out, run_header(plan)) as run:
            rendering = _Rendering(plan, run, self._executor, self._cancelled)
            try:
                yield from rendering.events()
            except _Cancelled:
                logger.info("render cancelled out=%s", self._out)
            finally:
                rendering.close()


class _Rendering:
    """One story on its way into one run directory."""

    def __init__(
        self,
        plan: RenderPlan,
        run: RunDirectory,
        executor: ThreadPoolExecutor,
        cancelled: threading.Event,
    ) -> None:
        self._plan, self._run = plan, run
        self._executor, self._cancelled = executor, cancelled
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._idle = threading.Event()  # set while the worker's thread does nothing
        self._idle.set()
        self._made_with: dict[str, str] = {}

    def events(self) -> Iterator[Event]:
        """Render all scenes."""
        todo = {scene.scene.id: self._missing(scene) for scene in self._plan.scenes}
        for scene in self._plan.scenes:
            for video in scene.videos:
                if video.id in todo[scene.scene.id]:
                    yield Queued(scene.scene.id, video.id)
                else:
                    yield self._done(scene, video, is_resumed=True)
        scenes = [scene for scene in self._plan.scenes if todo[scene.scene.id]]
        if scenes:
            worker = yield from self._await(partial(self._load, scenes))
            for scene in scenes:
                contact_sheet(self._run, scene).unlink(missing_ok=True)  # it shows the old state
                yield from self._render_scene(scene, worker, todo[scene.scene.id])
                self._run.write_manifest()
        for scene in self._plan.scenes:  # a crash may have come between video and sheet
            if not contact_sheet(self._run, scene).exists():
                write_contact_sheet(self._run, scene, {})

    def close(self) -> None:
        """Let the running step end, and leave a manifest of what there is."""
        if not self._idle.is_set():  # the caller left the stream
            self._cancelled.set()
            self._idle.wait()
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

    def _await(self, job: Callable[[], Result]) -> Generator[Event, None, Result]:
        """Run `job` in the worker's thread and yield what it emits. Raises what it raises."""
        if self._cancelled.is_set():
            raise _Cancelled

        def finish(_: Future[Result]) -> None:
            self._events.put(None)
            self._idle.set()

        self._idle.clear()
        future = self._executor.submit(job)
        future.add_done_callback(finish)
        while (event := self._events.get()) is not None:
            yield event
        return future.result()

    def _emit(self, event: Event) -> None:
        """Tell of a step, then end the render if it was cancelled. In the worker's thread."""
        self._events.put(event)
        if self._cancelled.is_set():
            raise _Cancelled

    def _load(self, scenes: Sequence[ScenePlan]) -> ModelWorker:
        """Load the model and encode every prompt of `scenes`. In the worker's thread."""
        from bachvid.actors import ModelWorker  # imports torch: seconds, for the worker only

        start = time.perf_counter()
        worker = ModelWorker(self._plan.config, self._plan.facts)
        worker.encode([video.prompt for scene in scenes for video in scene.videos])
        self._made_with = worker.made_with
        logger.info(
            "model loaded name=%s device=%s seconds=%.1f",
            self._plan.facts.name,
            worker.made_with["device"],
            time.perf_counter() - start,
        )
        return worker

    def _render_scene(
        self, scene: ScenePlan, worker: ModelWorker, todo: Mapping[str, Files]
    ) -> Iterator[Event]:
        """Render the identity video, for its cache even if its files are there, then the others."""
        from bachvid.actors import FrameVideoActor

        actor = FrameVideoActor(worker)
        try:
            identity, cache = yield from self._await(partial(self._identity, scene, worker))
            files = todo.get(scene.identity.id, {})
            self._keep(scene, scene.identity, files, rendered=identity, identity=identity)
        except WorkerError as error:
            for video_id in todo:
                yield self._failed(scene, video_id, error)
            return
        if scene.identity.id in todo:
            yield self._done(scene, scene.identity, is_resumed=False)
        yield Published(scene.scene.id, cache.store.nbytes)
        tiles: dict[str, Frames] = {scene.identity.id: sheet_tiles(identity.frames)}
        for video in scene.frames:
            if video.id not in todo:
                continue
            try:
                rendered = yield from self._await(partial(self._frame, scene, video, actor, cache))
                self._keep(scene, video, todo[video.id], rendered=rendered, identity=identity)
            except WorkerError as error:
                yield self._failed(scene, video.id, error)
                continue
            tiles[video.id] = sheet_tiles(rendered.frames)
            yield self._done(scene, video, is_resumed=False)
        write_contact_sheet(self._run, scene, tiles)

    def _identity(
        self, scene: ScenePlan, worker: ModelWorker
    ) -> tuple[RenderedVideo, IdentityCache]:
        from bachvid.actors import IdentityVideoActor

        num_steps = self._plan.config.sampling.num_steps
        assert num_steps is not None

        def on_step(_: Phase, step: int) -> None:
            self._emit(IdentityStep(scene.scene.id, step, num_steps))

        actor = IdentityVideoActor(worker)
        return actor.render(scene.scene.id, scene.identity, on_step=on_step)

    def _frame(
        self, scene: ScenePlan, video: VideoPlan, actor: FrameVideoActor, cache: IdentityCache
    ) -> RenderedVideo:
        num_steps, mask_step = (
            self._plan.config.sampling.num_steps,
            self._plan.config.method.mask_step,
        )
        assert num_steps is not None
        assert mask_step is not None

        def on_step(phase: Phase, step: int) -> None:
            steps = mask_step + 1 if phase == "pre_pass" else num_steps
            self._emit(FrameStep(scene.scene.id, video.id, phase, step, steps))

        return actor.render(scene.scene.id, video, cache, on_step=on_step)

    def _keep(
        self,
        scene: ScenePlan,
        video: VideoPlan,
        files: Files,
        *,
        rendered: RenderedVideo,
        identity: RenderedVideo,
    ) -> None:
        """Write `files` of a video and journal it. Raises WorkerError if it came out different."""
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
                cache_bytes=rendered.cache_bytes,
                recoveries=rendered.recoveries,
                made_with=self._made_with,
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

    def _failed(self, scene: ScenePlan, video_id: str, error: WorkerError) -> Failed:
        logger.warning("video failed scene=%s video=%s", scene.scene.id, video_id)
        self._run.commit_failure(scene.scene.id, video_id, str(error))
        return Failed(scene.scene.id, video_id, str(error))
