"""The results of an evaluation, for people (a table) and for programs (JSON and Parquet)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from bachvid.atomic import write_atomically
from bachvid.metrics.evaluate import Evaluation, Summary

if TYPE_CHECKING:
    from rich.table import Table


class Metric(NamedTuple):
    """How a metric is printed. `scale` is for the shown value only: files hold plain values."""

    name: str
    title: str
    unit: str
    digits: int
    scale: float = 1.0
    is_relative: bool = False  # the difference is shown in percent of the other run's mean


METRICS = (
    Metric("psnr_bg", "PSNR-BG, pairs", "dB", 2),
    Metric("ssim_bg", "SSIM-BG, pairs", "", 3),
    Metric("sharpness_bg", "background sharpness", "", 1, is_relative=True),
    Metric("attributes", "attributes as in the identity video", "%", 1, 100),
    Metric("prompt_background", "prompt: background", "%", 1, 100),
    Metric("prompt_character", "prompt: character", "%", 1, 100),
    Metric("prompt_action", "prompt: action", "%", 1, 100),
    Metric("motion", "motion in the mask", "", 2, is_relative=True),
    Metric("rendered", "videos rendered", "%", 1, 100),
    Metric("recovered", "videos with a recovery", "%", 1, 100),
    Metric("seconds", "seconds per frame video", "s", 2, is_relative=True),
    Metric("cache_mebibytes", "identity cache", "MiB", 1),
)


def evaluation_table(evaluations: Sequence[Evaluation]) -> Table:
    """Build the table: one column per run, and the first less each other run.

    Values are means; what stands after the sign is the standard error over scenes.
    """
    from rich.table import Table

    first, *others = evaluations
    table = Table(title=f"{first.path}", title_justify="left", caption_justify="left")
    table.add_column("metric")
    for evaluation in evaluations:
        table.add_column(evaluation.method, justify="right")
    for other in others:
        table.add_column(f"{first.method} - {other.method}", justify="right")
    for metric in METRICS:
        cells = [_cell(metric, evaluation.summary(metric.name)) for evaluation in evaluations]
        if any(cells):
            changes = [_change(metric, first, other) for other in others]
            table.add_row(_title(metric), *cells, *changes)
    notes = dict.fromkeys(note for evaluation in evaluations for note in evaluation.notes)
    table.caption = "\n".join(notes)
    return table


def write_results(run: Path, evaluations: Sequence[Evaluation]) -> None:
    """Write `metrics.json` (summaries) and `metrics.parquet` (every value) into `run`."""
    import pyarrow
    from pyarrow import parquet

    rows = [
        {
            "method": evaluation.method,
            "metric": item.metric,
            "scene": item.scene,
            "video": item.video,
            "detail": item.detail,
            "value": item.value,
        }
        for evaluation in evaluations
        for item in evaluation.measurements
    ]
    table = pyarrow.Table.from_pylist(rows)
    write_atomically(run / "metrics.parquet", lambda path: parquet.write_table(table, path))
    text = json.dumps(results_json(evaluations), indent=2, allow_nan=False) + "\n"
    write_atomically(run / "metrics.json", lambda path: _write_text(path, text))


def results_json(evaluations: Sequence[Evaluation]) -> dict[str, JsonValue]:
    """Return the summaries of all runs, and of the first less each other, as plain data."""
    first, *others = evaluations
    return {
        "runs": {
            evaluation.method: {
                "path": str(evaluation.path),
                "notes": list(evaluation.notes),
                "metrics": {
                    metric.name: _summary_json(evaluation.summary(metric.name))
                    for metric in METRICS
                },
            }
            for evaluation in evaluations
        },
        "differences": {
            f"{first.method} - {other.method}": {
                metric.name: _summary_json(first.difference(metric.name, other))
                for metric in METRICS
            }
            for other in others
        },
    }


def _title(metric: Metric) -> str:
    return f"{metric.title} ({metric.unit})" if metric.unit else metric.title


def _cell(metric: Metric, summary: Summary | None) -> str:
    if summary is None:
        return ""
    mean = f"{summary.mean * metric.scale:.{metric.digits}f}"
    if not summary.standard_error:
        return mean
    return f"{mean} +- {summary.standard_error * metric.scale:.{metric.digits}f}"


def _change(metric: Metric, first: Evaluation, other: Evaluation) -> str:
    summary, theirs = first.difference(metric.name, other), other.summary(metric.name)
    if summary is None or theirs is None:
        return ""
    if metric.is_relative and theirs.mean:
        return f"{100 * summary.mean / theirs.mean:+.1f} %"
    mean = f"{summary.mean * metric.scale:+.{metric.digits}f}"
    if not summary.standard_error:
        return mean
    return f"{mean} +- {summary.standard_error * metric.scale:.{metric.digits}f}"


def _summary_json(summary: Summary | None) -> dict[str, JsonValue] | None:
    return None if summary is None else dict(summary._asdict())


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
