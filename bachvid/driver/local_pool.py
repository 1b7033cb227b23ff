"""A pool of one worker, this process. Imports torch when there is work."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bachvid.engine.results import PreviewFrames, RunStep
from bachvid.errors import CacheMissError, CorruptShardError, WorkerError
from bachvid.planning.plan import RenderPlan
from bachvid.prompts.compose import Prompt
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
from bachvid.scheduling.schedule import Slot

if TYPE_CHECKING:
    from bachvid.engine.results import RenderedVideo
    from bachvid.engine.videos import Said
    from bachvid.engine.worker import ModelWorker
    from bachvid.kv.cache import MemoryPieces, SceneCache
    from bachvid.kv.files import FilePieces

    _Steps = Generator[Said, None, RenderedVideo | None]

logger = logging.getLogger(__name__)

logger = logging.getLogger(__name__)


class LocalPool:
    """This process as the one worker: `wait` renders one denoising step.

    For one device a local Ray would only add cost: seconds to start, and a copy of all keys and
    values.
    """

    def __init__(self, plan: RenderPlan) -> None:
        self._plan = plan
        self._worker: ModelWorker | None = None
        self._caches: dict[str, SceneCache] = {}
        self._sink: MemoryPieces | FilePieces | None = None  # of the job, if it is an identity
        self._running: tuple[Job, _Steps] | None = None

    def has_cache(self, job: Job) -> bool:
        """Open the cache that an earlier render left in `cache.directory`, if any."""
        folder = self._folder(job)
        if folder is None or not folder.exists():
            return False
        from bachvid.kv.cache import SceneCache
        from bachvid.kv.files import FilePieces, read_manifest

        try:
            manifest = read_manifest(folder)
        except CacheMissError as error:
            logger.warning("identity cache not used folder=%s: %s", folder, error)
            return False
        source = FilePieces(folder, records=manifest.records, config_hash=manifest.config_hash)
        self._caches[job.scene.scene.id] = SceneCache(manifest, source)
        return True

    def encode(self, prompts: Sequence[Prompt]) -> Sequence[Message]:
        """Load the model and the embeddings of `prompts`. Raises as `load_model` does."""
        start = time.perf_counter()
        worker = self._loaded()
        worker.encode(prompts)
        logger.info(
            "model loaded name=%s device=%s seconds=%.1f",
            self._plan.facts.name,
            worker.provenance["device"],
            time.perf_counter() - start,
        )
        return []

    @property
    def idle(self) -> Sequence[Slot]:
        """This process, unless it has a job."""
        return [] if self._running else [Slot(0, "")]

    @property
    def num_workers(self) -> int:
        """Always one."""
        return 1

    @property
    def is_growing(self) -> bool:
        """Never: no worker is ever being started."""
        return False

    def start(self, worker: int, job: Job) -> None:
        """Prepare to render; `wait` does it."""
        from bachvid.engine.videos import VideoJob, render_video
        from bachvid.kv.cache import MemoryPieces

        scene, runs = job.scene.scene.id, self._plan.runs(job.video.id)
        if job.is_identity:
            folder = self._folder(job)
            self._sink = MemoryPieces() if folder is None else self._loaded().new_files(folder)
            video = VideoJob("identity", scene, job.video, runs, sink=self._sink)
        else:
            opened = self._caches.__getitem__
            video = VideoJob("frame", scene, job.video, runs, open_scene=lambda: opened(scene))
        self._running = (job, render_video(self._loaded(), video))

    def wait(self) -> Sequence[Message]:
        """Render one denoising step of the job."""
        if self._running is None:
            return []
        job, steps = self._running
        try:
            said = next(steps)
        except StopIteration as end:
            self._running = None
            return self._ended(job, end.value)
        except WorkerError as error:
            self._running = None
            if isinstance(error.__cause__, CorruptShardError):
                self.forget(job.scene.scene.id)
                return [CacheLost(job, str(error))]
            return [Broken(job, str(error))]
        if isinstance(said, RunStep):
            return [Stepped(job, said)]
        if isinstance(said, PreviewFrames):
            return [Previewed(job, said.frames)]
        from bachvid.kv.cache import SceneCache

        assert self._sink is not None, "only an identity has a manifest"
        self._caches[job.scene.scene.id] = SceneCache(said, self._sink)
        return []

    def _ended(self, job: Job, rendered: RenderedVideo) -> Sequence[Message]:
        from bachvid.kv.files import write_manifest

        finished = Finished(job, rendered, self._loaded().provenance)
        if not job.is_identity:
            return [finished]
        folder = self._folder(job)
        if folder is not None:
            write_manifest(folder, self._caches[job.scene.scene.id].manifest)
        return [Recorded(job, self._plan.cache_bytes), finished]

    def _loaded(self) -> ModelWorker:
        """Return the worker of this process; the first call loads the model."""
        from bachvid.engine.worker import ModelWorker  # imports torch: seconds

        self._worker = self._worker or ModelWorker(self._plan.config, self._plan.facts)
        return self._worker

    def _folder(self, job: Job) -> Path | None:
        """Name the folder for the cache of a scene's identity video, if caches are kept."""
        config, identity = self._plan.config, job.scene.identity
        if config.cache.directory is None:
            return None
        decisive = json.dumps([config.sha256, identity.prompt.text, identity.seed])
        digest = hashlib.sha256(decisive.encode()).hexdigest()[:16]
        return Path(config.cache.directory) / f"{job.scene.scene.id}-{digest}"

    def abort(self, job: Job) -> None:
        """End the job, if it is this one that runs."""
        if self._running is not None and self._running[0] == job:
            self._running[1].close()
            self._running = None

    def forget(self, scene: str) -> None:
        """Free the identity cache of a scene."""
        self._caches.pop(scene, None)

    def close(self) -> None:
        """End the job, and free the model."""
        if self._running is not None:
            self.abort(self._running[0])
        self._caches.clear()
        self._sink = self._worker = None
