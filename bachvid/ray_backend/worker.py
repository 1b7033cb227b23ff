"""The Ray actor: one rank of a gang, which renders identity and frame videos.

Its rendering methods are streaming generators: the driver owns their items, so these outlive the
worker. Calls that come while it renders (credits, shards, the order to end) run in another
concurrency group and touch nothing but a `_Feed`. Imports torch only when it loads the model.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import RayError

from bachvid.catalog.registry import load_facts
from bachvid.engine.results import PreviewFrames, RunStep
from bachvid.errors import CorruptShardError, LostShardError, WorkerError
from bachvid.layout.gangs import Gang
from bachvid.methods.reading import ReadingOrder
from bachvid.planning.config import ResolvedConfig
from bachvid.planning.plan import VideoPlan
from bachvid.prompts.compose import Prompt

if TYPE_CHECKING:
    from bachvid.attention.groups import SequenceGroup
    from bachvid.engine.results import RenderedVideo
    from bachvid.engine.worker import ModelWorker
    from bachvid.kv.cache import IdentityManifest
    from bachvid.kv.packing import PackedStep

Item = TypeVar("Item")
_EMBEDS = "embeds"


@dataclass(frozen=True, slots=True)
class Note:
    """One small message in the stream of a job. Exactly one field is set; rank 0 sends all kinds.

    step: a denoising step is done.
    preview: an estimate of the finished video.
    part: the next item of the stream is this part of the publication, and no note.
    has_cache: the next item of the stream is the identity's manifest, and no note.
    is_over: the job has succeeded; from rank 0 with the video `rendered` and the seconds that it
        `waited` for keys and values.
    error, lost: the job has failed; `lost` if published keys and values were missing or damaged.
    """

    step: RunStep | None = None
    preview: PreviewFrames | None = None
    part: int | None = None
    has_cache: bool = False
    is_over: bool = False
    rendered: RenderedVideo | None = None
    waited: float = 0.0
    error: str | None = None
    lost: str | None = None


class _Aborted(BaseException):
    """The driver has aborted this job. No Exception, so that nothing handles it as a failure."""


class _Feed:
    """What the driver sends to a running job: credit, the cache, parts, the order to end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_aborted = False
        self._credit = 0
        self._cache: list[ray.ObjectRef[IdentityManifest]] = []  # one, once it is there
        self._parts: dict[int, Sequence[ray.ObjectRef[PackedStep]]] = {}

    def send(
        self,
        *,
        credit: int = 0,
        cache: Sequence[ray.ObjectRef[IdentityManifest]] = (),
        parts: Mapping[int, Sequence[ray.ObjectRef[PackedStep]]] | None = None,
        abort: bool = False,
    ) -> None:
        with self._changed:
            self._credit = max(self._credit, credit)
            self._cache = list(cache) or self._cache
            self._parts.update(parts or {})
            self._is_aborted |= abort
            self._changed.notify_all()

    def wait(self, is_there: Callable[[], bool] = lambda: True) -> None:
        """Wait until a condition holds. Raises _Aborted if the job is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_aborted or is_there())
        if self._is_aborted:
            raise _Aborted

    def wait_credit(self, part: int) -> None:
        """Wait until `part` may be published."""
        self.wait(lambda: part < self._credit)

    def wait_cache(self) -> IdentityManifest:
        """Wait for the identity's manifest. Raises LostShardError."""
        self.wait(lambda: bool(self._cache))
        (manifest,) = _pulled(self._cache, "masks and features")
        return manifest

    def fetch(self, part: int) -> Sequence[PackedStep]:
        """Wait for a part and pull to this node what this rank reads. Raises LostShardError."""
        self.wait(lambda: part in self._parts)
        return _pulled(self._parts[part], f"pieces of part {part}")

    def drop(self, passed: int) -> None:
        """Drop the first `passed` parts, so that the store can free them."""
        with self._changed:
            for part in [part for part in self._parts if part < passed]:
                del self._parts[part]


def _pulled(refs: Sequence[ray.ObjectRef[Item]], what: str) -> Sequence[Item]:
    try:
        items: Sequence[Item] = ray.get(list(refs))
    except RayError as error:
        raise LostShardError(
            f"the identity {what} are gone ({type(error).__name__}): the node or the store that "
            f"held them is lost"
        ) from error
    return items


class RayWorker:
    """One process that holds a model, or its share of one. `RayPool` calls its methods."""

    def __init__(self, config: ResolvedConfig, gang: Gang, rank: int) -> None:
        self._config, self._gang, self._rank = config, gang, rank
        self._model: ModelWorker | None = None
        self._feeds: dict[int, _Feed] = {}
        self._last_ended = -1
        self._lock = threading.Lock()

    def place(self) -> tuple[str, int]:
        """Return the node and the process id of this worker."""
        return str(ray.get_runtime_context().get_node_id()), os.getpid()

    def load(self, meeting: str) -> Mapping[str, str]:
        """Load the model without its text encoder; return its versions and device.

        The ranks of a gang find each other through a file of that name, used by this gang only.
        """
        from bachvid.attention.groups import ALONE
        from bachvid.engine.worker import ModelWorker

        group: SequenceGroup = ALONE
        if self._gang.size > 1:
            from bachvid.attention.parallel import join_group
            from bachvid.models.base import choose_device

            device = choose_device(self._config.model)
            path = Path(tempfile.gettempdir()) / meeting
            group = join_group(self._gang, self._rank, device=device, init_file=path)
        self._model = ModelWorker(self._config, load_facts(self._config.model), group)
        return self._model.provenance

    def encode(self, prompts: Sequence[Prompt]) -> Iterator[bytes]:
        """Yield the embeddings of each of `prompts`; then drop the text encoder.

        They are [1, T, C], in the bytes of safetensors: the driver holds them, without torch.
        """
        from safetensors.torch import save

        for prompt in prompts:
            yield save({_EMBEDS: self._worker.model.encode_prompts([prompt]).contiguous()})
        self._worker.model.free_text_encoder()

    @ray.method(concurrency_group="control")
    def send(self, number: int, **what: Any) -> None:
        """Pass arguments on to `_Feed.send` of a job; ignored if the job is over."""
        feed = self._feed(number)
        if feed is not None:
            feed.send(**what)

    def identity(
        self,
        number: int,
        scene: str,
        video: VideoPlan,
        embeds: Mapping[str, ray.ObjectRef[bytes]],
        *,
        is_window: bool,
        first: int,
    ) -> Iterator[Note | PackedStep | IdentityManifest]:
        """Render an identity video and publish what it records, from the part `first` on."""
        from bachvid.engine.videos import VideoJob, render_video

        worker, packer, is_lead = self._worker, self._worker.new_packer(), self._rank == 0
        runs = ReadingOrder(worker.method, is_window=is_window).identity_runs

        def render(feed: _Feed) -> Iterator[Note | PackedStep | IdentityManifest]:
            steps = render_video(worker, VideoJob("identity", scene, video, runs, sink=packer))
            part = 0
            while True:
                try:
                    said = next(steps)
                except StopIteration as end:
                    yield Note(is_over=True, rendered=end.value)
                    return
                feed.wait()
                if isinstance(said, PreviewFrames):
                    yield Note(preview=said)
                elif not isinstance(said, RunStep):
                    if is_lead:
                        yield Note(has_cache=True)
                        yield said
                else:
                    if is_lead:
                        yield Note(step=said)
                    packed = packer.take(said.step)
                    if packed is None:
                        continue
                    if part >= first:
                        feed.wait_credit(part)
                        yield Note(part=part)
                        yield packed
                    part += 1

        yield from self._job(number, embeds, render)

    def frame(
        self,
        number: int,
        scene: str,
        video: VideoPlan,
        embeds: Mapping[str, ray.ObjectRef[bytes]],
        *,
        is_window: bool,
    ) -> Iterator[Note]:
        """Render a frame video from the cache and the parts that it is sent."""
        from bachvid.engine.videos import VideoJob, render_video
        from bachvid.kv.cache import SceneCache
        from bachvid.kv.pulling import PulledPieces

        worker, is_lead = self._worker, self._rank == 0
        reading = ReadingOrder(worker.method, is_window=is_window)
        source: PulledPieces | None = None

        def render(feed: _Feed) -> Iterator[Note]:
            def open_scene() -> SceneCache:
                nonlocal source
                manifest = feed.wait_cache()
                source = source or PulledPieces(
                    lambda run, place: feed.fetch(reading.part(run, place)),
                    share=worker.share,
                    records=manifest.records,
                    passes=worker.facts.passes,
                    config_hash=manifest.config_hash,
                )
                return SceneCache(manifest, source)

            runs = worker.method.runs("frame")
            steps = render_video(
                worker, VideoJob("frame", scene, video, runs, open_scene=open_scene)
            )
            try:
                while True:
                    said = next(steps)
                    feed.wait()
                    if isinstance(said, PreviewFrames):
                        yield Note(preview=said)
                    elif isinstance(said, RunStep):
                        feed.drop(reading.passed(said.run, said.step))
                        if is_lead:
                            yield Note(step=said)
            except StopIteration as end:
                waited = source.wait_seconds if source else 0.0
                yield Note(is_over=True, rendered=end.value, waited=waited)
            finally:
                steps.close()
                if source is not None:
                    source.close()

        yield from self._job(number, embeds, render)

    @property
    def _worker(self) -> ModelWorker:
        assert self._model is not None, "not loaded"
        return self._model

    def _job(
        self,
        number: int,
        embeds: Mapping[str, ray.ObjectRef[bytes]],
        render: Callable[[_Feed], Iterator[Item]],
    ) -> Iterator[Item | Note]:
        """Yield the items of `render`, and at its end a note of any error."""
        from safetensors.torch import load

        feed = self._feed(number)
        assert feed is not None
        try:
            worker = self._worker
            found = zip(embeds, ray.get(list(embeds.values())), strict=True)
            worker.embeds = {
                text: load(saved)[_EMBEDS].to(worker.model.device) for text, saved in found
            }
            yield from render(feed)
        except _Aborted:
            return
        except WorkerError as error:
            if isinstance(error.__cause__, (CorruptShardError, LostShardError)):
                yield Note(lost=str(error))
            else:
                yield Note(error=str(error))
        finally:
            feed.send(abort=True)  # for a thread that still waits for parts
            with self._lock:
                self._feeds.pop(number, None)
                self._last_ended = max(self._last_ended, number)

    def _feed(self, number: int) -> _Feed | None:
        """Return the feed of a job, begun or to come; None if the job is over."""
        with self._lock:
            if number <= self._last_ended:
                return None
            return self._feeds.setdefault(number, _Feed())
