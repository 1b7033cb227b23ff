"""StoryRenderer, the driver API: plan a story, render it here or on a cluster, follow its events.

Imports no torch, and Ray only with an address.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from bachvid.driver.events import (
    Done,
    Event,
    Failed,
    FrameStep,
    IdentityStep,
    Lost,
    Preview,
    Published,
    Queued,
    Started,
    WorkerLost,
    WorkerPlaced,
)
from bachvid.driver.rendering import Rendering
from bachvid.errors import ConfigError
from bachvid.inputs.story import Story
from bachvid.output.files import run_header
from bachvid.output.run_directory import RunDirectory, disk_errors
from bachvid.planning.config import RenderConfig
from bachvid.planning.plan import RenderPlan, render_plan

if TYPE_CHECKING:
    from bachvid.planning.nodes import ClusterFacts

__all__ = [  # the driver API: the renderer and what it says
    "Done",
    "Event",
    "Failed",
    "FrameStep",
    "IdentityStep",
    "Lost",
    "Preview",
    "Published",
    "Queued",
    "Started",
    "StoryRenderer",
    "WorkerLost",
    "WorkerPlaced",
]


class StoryRenderer:
    """Renders stories into a run directory. Use as a context manager.

    Args:
        config: need not be resolved.
        out: the run directory.
        address: of a Ray cluster, as `ray.init` takes it ("auto" for the one that this process
            belongs to, "local" for one of this machine, ended with the renderer). None: in this
            process, without Ray, which is the shortest way on one device.

    Example:
        with StoryRenderer(config, Path("runs/lighthouse")) as renderer:
            for event in renderer.stream(story):
                print(event)
    """

    def __init__(self, config: RenderConfig, out: Path, *, address: str | None = None) -> None:
        self._config = config
        self._out = out
        self._address = address
        self._cancelled = threading.Event()
        self._connection = ExitStack()
        self._cluster: ClusterFacts | None = None

    def __enter__(self) -> StoryRenderer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()
        self._connection.close()

    def cancel(self) -> None:
        """End every stream after its current step. For any thread, and for signal handlers."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called: videos may be missing."""
        return self._cancelled.is_set()

    def plan(self, story: Story, *, source: str = "story") -> RenderPlan:
        """Return the plan that `stream` would render, on the cluster if there is an address.

        Loads no weights.

        `source` names the story in messages.

        Raises:
            ConfigError: the story or config cannot be rendered, or the cluster cannot do it.
            ModelSupportError: bachvid cannot run this model.
        """
        if self._address is not None and self._cluster is None:
            from bachvid.ray_backend.connection import ray_connection  # imports ray: half a second

            self._cluster = self._connection.enter_context(ray_connection(self._address))
        _check_one_rank(self._config, self._cluster)
        return render_plan(story, self._config, source=source, download=True, cluster=self._cluster)

    def stream(self, story: Story | RenderPlan, *, source: str = "story") -> Iterator[Event]:
        """Render what is missing of a story, or of its plan, and yield events.

        A video that fails does not fail its siblings. Rendering into the same directory again
        renders what is missing. A video that lacks only a file, because the file was lost or
        `output` asks for more than before, is rendered again, must come out as it was, and only
        that file is written. Leaving the iterator ends the render.

        Raises:
            ConfigError, ModelSupportError: as `plan` does, or the directory is another story's.
            WorkerError: the run directory cannot be written, or the cluster is lost.
        """
        plan = self.plan(story, source=source) if isinstance(story, Story) else story
        with disk_errors(self._out), RunDirectory(self._out, run_header(plan)) as run:
            rendering = Rendering(plan, run, self._cancelled)
            try:
                yield from rendering.events()
            finally:
                rendering.close()

    async def astream(
        self, story: Story | RenderPlan, *, source: str = "story"
    ) -> AsyncIterator[Event]:
        """Do what `stream` does, in a thread, for callers with an event loop."""
        events = self.stream(story, source=source)
        try:
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                yield event
        finally:
            await asyncio.to_thread(events.close)  # type: ignore[attr-defined]


def _check_one_rank(config: RenderConfig, cluster: ClusterFacts | None) -> None:
    for key in ("identity_gpus", "gpus_per_frame_actor"):
        size = getattr(config.parallel, key)
        if cluster is None and size > 1:
            raise ConfigError(
                f"parallel.{key}: is {size}: a single process has one rank; use --address local "
                f"for this machine's GPUs, or set it to 1"
            )
