"""What Ray costs a render: waiting for keys and values, and the makespan over its bound.

    python benchmarks/ray_render.py [--workers 2] [--policy retain]

Renders one scene with the embedded model through a local Ray, each worker with one thread. In the
same run it prints
- the share of the frame workers' time in which they waited for keys and values (target < 5 %);
- the time from the first step to the last video over the list-scheduling bound: the larger of all
  videos' seconds shared out over the workers, and the longest one (target <= 1.10).
Both need as many free cores as workers: on a busy machine the numbers say little.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click

from bachvid.driver.events import Done, IdentityStep
from bachvid.driver.renderer import StoryRenderer
from bachvid.inputs.story import IDENTITY_ID, Story
from bachvid.output.journal import read_run
from bachvid.planning.config import RenderConfig


@click.command()
@click.option("--workers", default=2, show_default=True)
@click.option("--policy", type=click.Choice(["retain", "window"]), default="retain")
@click.option("--actions", default=8, show_default=True, help="Frame videos of the scene.")
def main(workers: int, policy: str, actions: int) -> None:
    """Render once and print the ratios."""
    config = RenderConfig.from_yaml(
        None, [f"cluster.workers={workers}", f"cache.policy={policy}", "output.overlays=false"]
    )
    words = ("jumps", "squats", "waves an arm", "walks to the left")
    story = Story.model_validate(
        {
            "title": "One scene",
            "scenes": [
                {
                    "id": "desert",
                    "background": "a desert",
                    "character": "a green robot",
                    "identity": "stands still",
                    "actions": [
                        {"id": f"action-{i}", "text": words[i % len(words)], "seed": i}
                        for i in range(actions)
                    ],
                }
            ],
        }
    )
    started = ended = None
    waited = 0.0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        with StoryRenderer(config, out, address="local") as renderer:
            for event in renderer.stream(story):
                ended = time.perf_counter()
                if started is None and isinstance(event, IdentityStep):
                    started = ended
                if isinstance(event, Done):
                    waited += event.waited
                    click.echo(f"{event.video}: {event.seconds:.1f} s", err=True)
        records = read_run(out).records
    assert started is not None
    assert ended is not None
    seconds = {
        video: sum(s for name, s in record.seconds.items() if name != "write")
        for (_, video), record in records.items()
    }
    frames = sum(s for video, s in seconds.items() if video != IDENTITY_ID)
    # The first step is over when its event comes: it belongs to the time.
    makespan = ended - started + seconds[IDENTITY_ID] / 25
    bound = max(sum(seconds.values()) / workers, max(seconds.values()))
    click.echo(f"{policy}, {workers} workers, {actions} frame videos")
    click.echo(f"waiting / frame workers' time  {waited / frames:.3f}")
    click.echo(f"makespan / bound               {makespan / bound:.3f}")


if __name__ == "__main__":
    main()
