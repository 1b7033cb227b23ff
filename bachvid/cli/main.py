"""The command line: parses, prints, sets up logging. Slow imports are deferred.

Exit codes: 0 done, 1 some videos failed, 2 bad input, 130 cancelled by Ctrl-C, 143 by SIGTERM (as
`ray job stop` sends it).
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from bachvid import __version__
from bachvid.errors import BachvidError, CacheMissError, WorkerError

if TYPE_CHECKING:
    from rich.table import Table

    from bachvid.driver.renderer import StoryRenderer
    from bachvid.inputs.story import Story
    from bachvid.planning.config import RenderConfig

_TABLE_WIDTH = 120
SOME_FAILED, BAD_INPUT = 1, 2
_CANCELLED = 128  # and the number of the signal, as shells count

_STORY = click.argument("story", type=click.Path(path_type=Path))
_CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Config file (default: the embedded storybook model).",
)
_SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a config key, e.g. method.profile=fast.",
)
_ADDRESS = click.option(
    "--address", help='Ray cluster: "auto", "local" or host:port (default: this process alone).'
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
_VERBOSE = click.option("-v", "--verbose", is_flag=True, help="Log every stage to stderr.")


class _BadInput(click.ClickException):
    exit_code = BAD_INPUT


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (WorkerError, CacheMissError) as error:
            raise click.ClickException(str(error)) from error  # exit code 1
        except BachvidError as error:
            raise _BadInput(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bachvid")
def main() -> None:
    """Render stories as videos in which background and character stay the same."""
    for stream in (sys.stdout, sys.stderr):
        # A title may hold what the terminal's encoding has no letter for.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@main.command()
@_STORY
@_CONFIG
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Run directory (default: runs/<name of STORY>).",
)
@_ADDRESS
@_SET
@_VERBOSE
def render(
    story: Path,
    config: Path | None,
    out: Path | None,
    address: str | None,
    overrides: tuple[str, ...],
    verbose: bool,
) -> None:
    """Render STORY, or what is missing of it, into a run directory."""
    from bachvid.inputs.story import Story
    from bachvid.planning.config import RenderConfig

    _configure_logging(verbose=verbose)
    loaded, settings = Story.load(story), RenderConfig.from_yaml(config, overrides)
    folder = out or Path("runs") / story.stem
    _render(loaded, settings, folder, source=str(story), address=address)


@main.command()
@_STORY
@_CONFIG
@_ADDRESS
@_SET
@_JSON
def plan(
    story: Path,
    config: Path | None,
    address: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print what rendering STORY would do: prompts, tokens, seeds, bytes and time.

    With --address also where: workers, waves and bytes on every node.
    """
    import json

    from bachvid.inputs.story import Story
    from bachvid.planning.config import RenderConfig
    from bachvid.planning.plan import render_plan
    from bachvid.planning.text import plan_json, plan_text

    loaded, settings = Story.load(story), RenderConfig.from_yaml(config, overrides)
    cluster = None
    if address is not None:
        from bachvid.ray_backend.connection import read_cluster

        cluster = read_cluster(address)
    decided = render_plan(loaded, settings, source=str(story), cluster=cluster)
    click.echo(json.dumps(plan_json(decided), indent=2) if as_json else plan_text(decided))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--against", type=click.Choice(["none"]), help="Render the story without a method, and compare."
)
@_JSON
@_VERBOSE
def evaluate(run: Path, against: str | None, as_json: bool, verbose: bool) -> None:
    """Measure the videos of the run directory RUN, and keep the results in it."""
    import json

    from bachvid.metrics.evaluate import evaluate_run, vanilla_twin
    from bachvid.metrics.table import evaluation_table, results_json, write_results

    _configure_logging(verbose=verbose)
    evaluations = [evaluate_run(run)]
    if against:
        twin = vanilla_twin(run)
        _render(twin.story, twin.config, twin.out, source=str(run))
        evaluations.append(evaluate_run(twin.out))
    write_results(run, evaluations)
    if as_json:
        click.echo(json.dumps(results_json(evaluations), indent=2))
    else:
        _print_table(evaluation_table(evaluations))


@main.command()
def check() -> None:
    """Check this machine: versions, devices, the embedded model, and one small render."""
    from bachvid.cli.check import run_checks

    failed = False
    for result in run_checks():
        click.echo(f"{'ok  ' if result.ok else 'FAIL'}  {result.name}: {result.found}")
        failed |= not result.ok
    if failed:
        sys.exit(SOME_FAILED)


def _render(
    story: Story, config: RenderConfig, out: Path, *, source: str, address: str | None = None
) -> None:
    """Render a story and show its progress. Exits unless every video is done."""
    from bachvid.cli.progress import open_progress
    from bachvid.driver.events import Done, Failed
    from bachvid.driver.renderer import StoryRenderer

    done, failed = 0, 0
    with (
        StoryRenderer(config, out, address=address) as renderer,
        _cancelled_by_signals(renderer) as signals,
    ):
        plan = renderer.plan(story, source=source)
        with open_progress(plan) as progress:
            for event in renderer.stream(plan):
                progress.show(event)
                done += isinstance(event, Done)
                failed += isinstance(event, Failed)
    num_videos = sum(len(scene.videos) for scene in plan.scenes)
    click.echo(f"{done} of {num_videos} videos in {out}", err=True)
    if signals:
        click.echo("Cancelled; render again to go on.", err=True)
        sys.exit(_CANCELLED + signals[0])
    if failed:
        click.echo(f"{failed} failed, see {out}/manifest.json; render again to retry.", err=True)
        sys.exit(SOME_FAILED)


def _print_table(table: Table) -> None:
    from rich.console import Console

    # A pipe has no width: rich would take 80, and break the lines of the table.
    Console(width=None if sys.stdout.isatty() else _TABLE_WIDTH).print(table)


@contextmanager
def _cancelled_by_signals(renderer: StoryRenderer) -> Iterator[list[int]]:
    """End after the current step on the first Ctrl-C or SIGTERM; the next one interrupts at once.

    Yields a list that the number of the signal will be in.
    """
    received: list[int] = []
    originals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, original in originals.items():
            signal.signal(number, original)

    def cancel(number: int, frame: FrameType | None) -> None:
        restore()
        received.append(number)
        renderer.cancel()

    for number in originals:
        signal.signal(number, cancel)
    try:
        yield received
    finally:
        restore()


def _configure_logging(*, verbose: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
