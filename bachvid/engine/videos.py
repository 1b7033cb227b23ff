"""Renders one video of any role in one process, through all the runs that its method asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bachvid.attention.context import RunContext
from bachvid.engine.results import Frames, PreviewFrames, RenderedVideo, RunStep
from bachvid.engine.worker import ModelWorker
from bachvid.errors import WorkerError
from bachvid.kv.cache import IdentityManifest, MemoryPieces, PieceSink, SceneCache
from bachvid.methods.base import Observation, Role, Run, RunInputs
from bachvid.planning.plan import VideoPlan


@dataclass(frozen=True, slots=True)
class VideoJob:
    """One video to render.

    runs: in order; the last one gives the video.
    sink: where an identity video is recorded.
    open_scene: returns the cache that a frame video reads; called when a run first reads, and
        may wait for the identity.
    source: the frames of a finished video, for an identity that is replayed and not sampled.
    """

    role: Role
    scene: str
    video: VideoPlan
    runs: tuple[Run, ...]
    sink: PieceSink | None = None
    open_scene: Callable[[], SceneCache] | None = None
    source: Frames | None = None


Said = RunStep | IdentityManifest | PreviewFrames


def render_video(worker: ModelWorker, job: VideoJob) -> Generator[Said, None, RenderedVideo | None]:
    """Render a video and yield every step of its runs; return None on ranks that see no pixels.

    The manifest of an identity is yielded once, as soon as the video has been observed. Every
    rank of a gang yields the same steps.
    Raises WorkerError for any failure, naming the video and the step.
    """
    seconds: dict[str, float] = {}
    context, kept = worker.new_context(), MemoryPieces()
    earlier: list[Observation] = []
    is_announced = job.role != "identity"
    with _blamed(job, context):
        prompt = worker.tokenize(job.video)
        clean = None if job.source is None else worker.model.encode(job.source)
        track = None if clean is None else worker.source_track(clean, job.video)
        for number, run in enumerate(job.runs):
            is_last = number == len(job.runs) - 1
            with _timed(seconds, "main_run" if is_last else "pre_pass"):  # includes matching
                scene = _open_scene(worker, job, run)
                given = RunInputs(run, context, prompt, kept, job.sink, scene, tuple(earlier))
                # An identity that is run again for its readers is the same run to the method.
                control = worker.method.control(
                    job.role, 0 if job.role == "identity" else number, given
                )
                for done in worker.steps(context, run, job.video, control, track):
                    latents = done.latents
                    yield RunStep(number, done.step)
                    seen = control.observation
                    if seen is not None and not is_announced:
                        is_announced = True
                        yield worker.manifest(context, seen, job.video.seed)
                    if is_last and track is None:
                        yield from worker.previews(done)
            if control.observation is not None:
                earlier.append(control.observation)
        with _timed(seconds, "decode"):
            frames = worker.decode(latents) if clean is None else job.source
        if frames is None or not worker.sees_pixels:
            return None
        return worker.rendered(latents if clean is None else clean, frames, control, seconds)


def _open_scene(worker: ModelWorker, job: VideoJob, run: Run) -> SceneCache | None:
    """Open, check and begin to read the cache of a run; None if the run reads nothing."""
    if not run.reads:
        return None
    assert job.open_scene is not None, "only a frame video reads"
    scene = job.open_scene()
    worker.check(scene.manifest)
    scene.source.begin(run.sources)
    return scene


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time of the block to the seconds of a stage."""
    start = time.perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 3)


@contextmanager
def _blamed(job: VideoJob, context: RunContext) -> Iterator[None]:
    """Wrap any failure in a WorkerError that names the video and the step."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip() or "no reason given"
        raise WorkerError(
            f"{job.scene}/{job.video.id} failed at step {context.step}: "
            f"{type(error).__name__}: {reason}"
        ) from error
