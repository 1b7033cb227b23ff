"""Which process renders what, as the events of a render tell."""

from __future__ import annotations

from bachvid.driver.events import Event, Started, WorkerPlaced


class Whereabouts:
    """The workers of one render; it must be told of every event."""

    def __init__(self) -> None:
        self.placed: dict[tuple[int, int], WorkerPlaced] = {}  # by worker and rank
        self._workers: dict[tuple[str, str], int] = {}  # that a video was given to last

    def note(self, event: Event) -> None:
        """Remember where a worker is, or what it was given."""
        if isinstance(event, WorkerPlaced):
            self.placed[event.worker, event.rank] = event
        elif isinstance(event, Started):
            self._workers[event.scene, event.video] = event.worker

    def pid_of(self, scene: str, video: str, *, rank: int = 0) -> int:
        """Return the process that a video was given to last."""
        return self.placed[self._workers[scene, video], rank].pid
