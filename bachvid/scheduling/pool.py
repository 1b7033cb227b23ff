"""What a driver needs of the processes that render: a pool, and the messages of its workers.

A pool runs jobs, one at a time on each of its workers, and says what became of them. It decides
nothing: what runs when is `bachvid.scheduling.schedule`, what is kept `bachvid.driver.rendering`.
The pools are `bachvid.driver.local_pool` and, of Ray actors, `bachvid.ray_backend.pool`. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bachvid.engine.results import RunStep
from bachvid.inputs.story import IDENTITY_ID
from bachvid.planning.plan import ScenePlan, VideoPlan
from bachvid.prompts.compose import Prompt
from bachvid.scheduling.schedule import Slot

if TYPE_CHECKING:
    from bachvid.engine.results import Frames, RenderedVideo


@dataclass(frozen=True, slots=True)
class Job:
    """One video to render."""

    scene: ScenePlan
    video: VideoPlan

    @property
    def is_identity(self) -> bool:
        """Whether it is the identity video of its scene."""
        return self.video.id == IDENTITY_ID


@dataclass(frozen=True, slots=True)
class Stepped:
    """A job has done a denoising step."""

    job: Job
    step: RunStep


@dataclass(frozen=True, slots=True)
class Previewed:
    """A job shows what its video will become."""

    job: Job
    frames: Frames


@dataclass(frozen=True, slots=True)
class Recorded:
    """The identity cache of a scene is whole."""

    job: Job
    nbytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A job has ended well; it waited for pieces of its identity video for `waited` seconds."""

    job: Job
    rendered: RenderedVideo
    provenance: Mapping[str, str]
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class Broken:
    """A job cannot be rendered; its worker is well."""

    job: Job
    error: str


@dataclass(frozen=True, slots=True)
class JobLost:
    """A job is gone, with its worker or with what it had published; another attempt may succeed."""

    job: Job
    reason: str


@dataclass(frozen=True, slots=True)
class CacheLost:
    """A frame video found identity keys and values gone or damaged: its scene has no cache now.

    If the identity video is still being rendered, it is lost, too.
    """

    job: Job
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerPlaced:
    """A rank of a worker runs: as process `pid`, on `node`. Its model is loaded next."""

    worker: int
    rank: int
    node: str
    pid: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A rank of a worker died, and all of it was started anew, with another number."""

    worker: int
    reason: str


JobMessage = Stepped | Previewed | Recorded | Finished | Broken | JobLost | CacheLost
WorkerMessage = WorkerPlaced | WorkerLost
Message = JobMessage | WorkerMessage


class Pool(Protocol):
    """Workers that render, each one job at a time."""

    def encode(self, prompts: Sequence[Prompt]) -> Sequence[Message]:
        """Load the model and the embeddings of `prompts`; return what workers said meanwhile.

        Raises as `load_model` does.
        """

    @property
    def idle(self) -> Sequence[Slot]:
        """Workers that can start a job now."""

    @property
    def num_workers(self) -> int:
        """Workers that are alive or being started."""

    @property
    def is_growing(self) -> bool:
        """Whether a worker is being started, or ends a job that is over: it will be idle soon."""

    def start(self, worker: int, job: Job) -> None:
        """Give a job to an idle worker."""

    def wait(self) -> Sequence[Message]:
        """Wait for something to happen, but not for long; raises WorkerError if nothing can."""

    def abort(self, job: Job) -> None:
        """End a job, if it runs; nothing more is said of it."""

    def forget(self, scene: str) -> None:
        """Free the identity cache of a scene, if there is one."""

    def close(self) -> None:
        """End all jobs and workers, and leave nothing behind."""
