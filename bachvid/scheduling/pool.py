"""The interface of a pool of rendering processes, and the messages of its workers.

A pool runs jobs, one at a time on each of its workers, and reports what became of them. It decides
nothing: `bachvid.scheduling.schedule` says what runs when, `bachvid.driver.rendering` what is kept.
There are two: `bachvid.driver.local_pool` and, of Ray actors, `bachvid.ray_backend.pool`. No torch.
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
    """A job shows an estimate of its finished video."""

    job: Job
    frames: Frames


@dataclass(frozen=True, slots=True)
class Recorded:
    """The identity cache of a scene is complete."""

    job: Job
    nbytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A job has succeeded. It waited `waited` seconds for pieces of its identity video."""

    job: Job
    rendered: RenderedVideo
    provenance: Mapping[str, str]
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class Broken:
    """A job has failed and would fail again; its worker goes on."""

    job: Job
    error: str


@dataclass(frozen=True, slots=True)
class JobLost:
    """A job was lost, with its worker or with its published pieces; another try may succeed."""

    job: Job
    reason: str


@dataclass(frozen=True, slots=True)
class CacheLost:
    """A frame video found pieces missing or damaged: its scene has no cache now.

    If the identity video is still being rendered, it is lost, too.
    """

    job: Job
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerPlaced:
    """A rank of a worker has started, as process `pid` on `node`. It loads its model next."""

    worker: int
    rank: int
    node: str
    pid: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A rank of a worker died; the whole worker was started again, with another number."""

    worker: int
    reason: str


JobMessage = Stepped | Previewed | Recorded | Finished | Broken | JobLost | CacheLost
WorkerMessage = WorkerPlaced | WorkerLost
Message = JobMessage | WorkerMessage


class Pool(Protocol):
    """Workers that render, each one job at a time."""

    def encode(self, prompts: Sequence[Prompt]) -> Sequence[Message]:
        """Load the model and the embeddings of `prompts`; return the messages that came meanwhile.

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
        """Whether a worker will be idle soon: it is being started, or is ending an aborted job."""

    def start(self, worker: int, job: Job) -> None:
        """Give a job to an idle worker."""

    def wait(self) -> Sequence[Message]:
        """Wait for messages, for a short time. Raises WorkerError if none can ever come."""

    def abort(self, job: Job) -> None:
        """End a job, if it runs. No more messages of it follow."""

    def forget(self, scene: str) -> None:
        """Free the identity cache of a scene, if there is one."""

    def close(self) -> None:
        """End all jobs and workers, and leave nothing behind."""
