"""What each profile and noise policy holds constant over a scene: the table of the README.

    python benchmarks/consistency.py examples/six_scenes.yaml [--out runs/consistency]

Renders the story with `paper`, `fast` and without a method, each with the same noise for all
videos of a scene and with a different noise for every video, and measures all six runs in the
same way. Finished videos are kept: a second call only measures.
"""

from __future__ import annotations

from pathlib import Path

import click

from bachvid.driver.events import Failed
from bachvid.driver.renderer import StoryRenderer
from bachvid.inputs.story import Story
from bachvid.metrics.evaluate import Evaluation, evaluate_run
from bachvid.metrics.table import METRICS
from bachvid.planning.config import RenderConfig

POLICIES = ("independent", "same")
METHODS = {
    "paper": ("method.profile=paper",),
    "fast": ("method.profile=fast",),
    "none": ("method.name=none",),
}


def render(story: Story, out: Path, overrides: tuple[str, ...]) -> None:
    """Render what is missing of one run; say which videos failed."""
    config = RenderConfig.from_yaml(
        None, ("output.frames=true", "output.overlays=false", *overrides)
    )
    with StoryRenderer(config, out) as renderer:
        for event in renderer.stream(story):
            if isinstance(event, Failed):
                click.echo(f"failed: {event}", err=True)


def row(metric: str, runs: dict[tuple[str, str], Evaluation], scale: float, digits: int) -> str:
    """Return the Markdown cells of one metric."""
    cells = []
    for evaluation in runs.values():
        summary = evaluation.summary(metric)
        cells.append("-" if summary is None else f"{summary.mean * scale:.{digits}f}")
    return " | ".join(cells)


@click.command()
@click.argument("story", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/consistency"))
@click.option("--set", "overrides", multiple=True, help="As of `bachvid render`, for every run.")
def main(story: Path, out: Path, overrides: tuple[str, ...]) -> None:
    """Render and measure; print a Markdown table."""
    loaded = Story.load(story)
    runs: dict[tuple[str, str], Evaluation] = {}
    for policy in POLICIES:
        for method, keys in METHODS.items():
            path = out / f"{method}-{policy}"
            render(loaded, path, (*keys, f"sampling.noise={policy}", *overrides))
            runs[method, policy] = evaluate_run(path)
    heads = [f"`{method}`, {policy}" for method, policy in runs]
    click.echo("| metric | " + " | ".join(heads) + " |")
    click.echo("| --- |" + " ---: |" * len(heads))
    for metric in METRICS:
        unit = f" ({metric.unit})" if metric.unit else ""
        cells = row(metric.name, runs, metric.scale, metric.digits)
        click.echo(f"| {metric.title}{unit} | {cells} |")
    for (method, policy), evaluation in runs.items():
        for note in evaluation.notes:
            click.echo(f"{method}, {policy}: {note}", err=True)


if __name__ == "__main__":
    main()
