"""The pool that is this process alone."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bachvid.engine.steps import PreviewFrames, RunStep
from bachvid.errors import CacheMissError, CorruptShardError, WorkerError
from bachvid.planning.plan import RenderPlan
from bachvid.planning.resolve import config_hash, recorded_steps
from bachvid.prompts.compose import Prompt
from bachvid.scheduling.schedule import Slot

if TYPE_CHECKING:
    from bachvid.engine.results import RenderedVideo
    from bachvid.engine.worker import ModelWorker
    from bachvid.kv.cache import IdentityCache

    _Run = Generator[RunStep | IdentityCache | PreviewFrames, None, RenderedVideo | None]

from bachvid.scheduling.pool import (
    Broken,
    CacheLost,
    Finished,
    Job,
    Message,
    Previewed,
    Recorded,
    Stepped,
)

logger = logging.getLogger(__name__)


class LocalPool:
    """This process as the one worker: `wait` renders one denoising step.

    Not a local Ray: for one device a second process would only cost, seconds of start and a copy
    of the keys and values.
    """

    def __init__(self, plan: RenderPlan) -> None:
        self._plan = plan
        self._worker: ModelWorker | None = None
        self._caches: dict[str, IdentityCache] = {}
        self._job: Job | None = None
        self._run: _Run | None = None

    def has_cache(self, job: Job) -> bool:
        """Open the cache that an identity video left in `cache.directory` in another render."""
        folder = self._folder(job)
        if folder is None or not folder.exists():
            return False
        from bachvid.kv.files import FileKVStore

        try:
            self._caches[job.scene.scene.id] = FileKVStore.load(folder)
        except CacheMissError as error:
            logger.warning("identity cache not used folder=%s: %s", folder, error)
            return False
        return True

    def encode(self, prompts: Sequence[Prompt]) -> Sequence[Message]:
        """Load the model and the embeddings of `prompts`. Raises as `load_model` does."""
        from bachvid.engine.worker import ModelWorker

        start = time.perf_counter()
        self._worker = self._worker or ModelWorker(self._plan.config, self._plan.facts)
        self._worker.encode(prompts)
        logger.info(
            "model loaded name=%s device=%s seconds=%.1f",
            self._plan.facts.name,
            self._worker.made_with["device"],
            time.perf_counter() - start,
        )
        return []

    @property
    def idle(self) -> Sequence[Slot]:
        """This process, unless it has a job."""
        return [] if self._job else [Slot(0, "")]

    @property
    def num_workers(self) -> int:
        """One."""
        return 1

    @property
    def is_growing(self) -> bool:
        """No."""
        return False

    def start(self, worker: int, job: Job) -> None:
        """Prepare to render; `wait` does it."""
        from bachvid.engine.videos import FrameVideoActor, IdentityVideoActor
        from bachvid.kv.cache import MemoryKVStore

        assert self._worker is not None
        scene = job.scene.scene.id
        self._job = job
        if job.is_identity:
            identity = IdentityVideoActor(self._worker)
            records = [recorded_steps(self._plan.config.method)]
            folder = self._folder(job)
            store = MemoryKVStore() if folder is None else self._worker.new_file_store(folder)
            self._run = identity.render(scene, job.video, store, records=records)
        else:
            frame = FrameVideoActor(self._worker)
            self._run = frame.render(scene, job.video, lambda: self._caches[scene])

    def wait(self) -> Sequence[Message]:
        """Render one denoising step of the job."""
        job, run = self._job, self._run
        assert job is not None
        assert run is not None
        try:
            item = next(run)
        except StopIteration as end:
            self._job = self._run = None
            return self._ended(job, end.value)
        except WorkerError as error:
            self._job = self._run = None
            if isinstance(error.__cause__, CorruptShardError):
                self.forget(job.scene.scene.id)
                return [CacheLost(job, str(error))]
            return [Broken(job, str(error))]
        if isinstance(item, RunStep):
            return [Stepped(job, item)]
        if isinstance(item, PreviewFrames):
            return [Previewed(job, item.frames)]
        self._caches[job.scene.scene.id] = item
        return []

    def _ended(self, job: Job, rendered: RenderedVideo) -> Sequence[Message]:
        from bachvid.kv.files import FileKVStore

        assert self._worker is not None
        finished = Finished(job, rendered, self._worker.made_with)
        if not job.is_identity:
            return [finished]
        cache = self._caches[job.scene.scene.id]
        if isinstance(cache.store, FileKVStore):
            cache.store.save(cache)
        return [Recorded(job, self._plan.cache_bytes), finished]

    def _folder(self, job: Job) -> Path | None:
        """Name the folder for the cache of a scene's identity video, if caches are kept."""
        config, identity = self._plan.config, job.scene.identity
        if config.cache.directory is None:
            return None
        decisive = json.dumps([config_hash(config), identity.prompt.text, identity.seed])
        digest = hashlib.sha256(decisive.encode()).hexdigest()[:16]
        return Path(config.cache.directory) / f"{job.scene.scene.id}-{digest}"

    def abort(self, job: Job) -> None:
        """End the job, if it is this one that runs."""
        if job == self._job and self._run is not None:
            self._run.close()
            self._job = self._run = None

    def forget(self, scene: str) -> None:
        """Free the identity cache of a scene."""
        self._caches.pop(scene, None)

    def close(self) -> None:
        """End the job, and free the model."""
        if self._job:
            self.abort(self._job)
        self._caches.clear()
        self._worker = None
