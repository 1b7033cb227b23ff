"""The full-size benchmark runs at a tiny size, so that it runs when there is a GPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bachvid.models.registry import ADAPTERS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("family", "model"),
    [("cogvideox", "THUDM/CogVideoX-5b"), ("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers")],
)
def test_a_full_size_video_is_measured_with_its_pieces_at_every_place(
    family: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(ADAPTERS, family, ADAPTERS[family])  # is put back
    full_size = importlib.import_module("full_size")
    results = tmp_path / "results.jsonl"
    arguments = ["--model", model, "--size", "tiny", "--steps", "3", "--foreground", "0.3"]
    arguments += ["--results", str(results)]
    done = CliRunner().invoke(full_size.main, arguments)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    summaries = [row for row in rows if row["kind"] == "summary"]
    assert [(row["profile"], row["place"]) for row in summaries] == [
        (profile, place)
        for profile in ("paper", "fast")
        for place in ("memory", "resident", "pulled")
    ]
    for row in summaries:
        assert row["injected_over_plain"] > 0
        assert row["video_of_50_steps_over_vanilla"] > 0
    # The boxes stand in for the masks: every run reads what was recorded, and nothing is missed.
    steps = {row["profile"]: len(row["seconds"]) for row in rows if row["kind"] == "frame"}
    assert steps == {"fast": 2 + 2 + 3, "paper": 2 + 3}
    assert [row["frames"] for row in rows if row["kind"] == "decode"] == [[9, 64, 96, 3]] * 2
