"""Renders one video in one process, in the role of an identity or of a frame video."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

from bachvid.attention.context import RunContext
from bachvid.engine.results import RenderedVideo
from bachvid.engine.steps import Phase, PreviewFrames, RunStep
from bachvid.engine.timing import timed
from bachvid.engine.worker import ModelWorker
from bachvid.errors import WorkerError
from bachvid.kv.cache import IdentityCache, KVStore
from bachvid.methods.base import Observation
from bachvid.planning.plan import VideoPlan


class IdentityVideoActor:
    """Renders the identity video of a scene and records what its frame videos need."""

    def __init__(self, worker: ModelWorker) -> None:
        self._worker = worker

    def render(
        self,
        scene: str,
        video: VideoPlan,
        store: KVStore,
        *,
        records: Sequence[Sequence[int]],
    ) -> Generator[RunStep | IdentityCache | PreviewFrames, None, RenderedVideo | None]:
        """Render the video: yield every step, and the cache as soon as the mask is known.

        There is one run for each of `records`, which names the steps that it puts into `store`.
        All but the last end with the mask step: they serve pre-passes, which end there too. The
        cache is yielded in the first run. Every rank of a gang yields the same steps.
        Raises WorkerError, naming video and step, whatever goes wrong.
        """
        worker, seconds = self._worker, dict[str, float]()
        run = worker.new_run()
        with _blamed(scene, video, run):
            prompt = worker.tokenize(video)
            for number, steps in enumerate(records):
                control = worker.method.identity_control(run, prompt, store, steps=steps)
                phase: Phase = "main_run" if number == len(records) - 1 else "pre_pass"
                with timed(seconds, phase):
                    for done in worker.denoise(run, video, control, phase=phase):
                        latents = done.latents
                        yield RunStep(number, done.step)
                        if number == 0 and done.step == worker.config.method.mask_step:
                            yield control.cache(video.seed)
                        if phase == "main_run":
                            yield from worker.previews(done)
            return worker.finish(latents, control, seconds=seconds, cache_bytes=store.nbytes)


class FrameVideoActor:
    """Renders frame videos, each from the identity cache of its scene."""

    def __init__(self, worker: ModelWorker) -> None:
        self._worker = worker

    def render(
        self, scene: str, video: VideoPlan, open_cache: Callable[[], IdentityCache]
    ) -> Generator[RunStep | PreviewFrames, None, RenderedVideo | None]:
        """Render the video: yield every step of all its runs, as `method.reads` counts them.

        `open_cache` gives the cache when it is first needed; it may wait for the identity video.
        Raises WorkerError, naming video and step, whatever goes wrong.
        """
        worker, seconds = self._worker, dict[str, float]()
        method, run = worker.method, worker.new_run()
        observation: Observation | None = None
        with _blamed(scene, video, run):
            prompt = worker.tokenize(video)
            for number, steps in enumerate(method.reads[:-1]):
                with timed(seconds, "pre_pass"):
                    cache = _begin(open_cache(), steps) if steps else None
                    control = method.pre_pass_control(run, prompt, cache, observation)
                    for done in worker.denoise(run, video, control, phase="pre_pass"):
                        yield RunStep(number, done.step)
                    observation = control.observation
            with timed(seconds, "main_run"):  # matching belongs to it
                cache = _begin(open_cache(), method.reads[-1])
                control = method.frame_control(run, prompt, cache, observation)
                for done in worker.denoise(run, video, control, phase="main_run"):
                    latents = done.latents
                    yield RunStep(len(method.reads) - 1, done.step)
                    yield from worker.previews(done)
            return worker.finish(latents, control, seconds=seconds, cache_bytes=cache.store.nbytes)


def _begin(cache: IdentityCache, steps: Sequence[int]) -> IdentityCache:
    cache.store.begin(steps)
    return cache


@contextmanager
def _blamed(scene: str, video: VideoPlan, run: RunContext) -> Iterator[None]:
    """Name video and step in whatever goes wrong: here a process may end.

    A step callback that cancels raises no Exception, but a BaseException, and passes.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).strip() or "no reason given"
        raise WorkerError(
            f"{scene}/{video.id} failed at step {run.step}: {type(error).__name__}: {reason}"
        ) from error
