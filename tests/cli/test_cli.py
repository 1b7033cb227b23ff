"""The command line, from the outside: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from bad_inputs import GOOD_STORY
from click.testing import CliRunner, Result
from json_models import write_json_model

from bachvid import __version__
from bachvid.cli.main import main

STORY = """\
title: A walk
scenes:
- id: street
  background: a street
  character: a dog
  actions: [runs, jumps]
"""


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.yaml"
    path.write_text(STORY)
    return path


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def settings_for(model: Path, num_steps: int = 2) -> list[str]:
    values = [f"model.id={model}", f"sampling.num_steps={num_steps}", "model.threads=1"]
    return [part for value in values for part in ("--set", value)]


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("render", "plan", "evaluate", "check"):
        assert f"  {command} " in result.stdout


def test_there_are_at_most_eight_options() -> None:
    commands = [main, *main.commands.values()]
    options = {
        parameter.name
        for command in commands
        for parameter in command.params
        if isinstance(parameter, click.Option)
    }
    assert len(options) <= 8


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == f"bachvid, version {__version__}\n"


def test_an_unknown_option_is_bad_input(story: Path) -> None:
    assert run("render", story, "--stesp", "3").exit_code == 2


def test_plan_prints_json(tmp_path: Path) -> None:
    model = write_json_model(tmp_path / "model", with_vocabulary=True)
    path = tmp_path / "story.yaml"
    path.write_text(GOOD_STORY)
    result = run("plan", path, "--set", f"model.id={model}", "--json")
    assert json.loads(result.stdout)["title"] == "A day"
    assert result.stderr == ""


def test_plan_prints_a_title_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    model = write_json_model(tmp_path / "model", with_vocabulary=True)
    path = tmp_path / "story.yaml"
    path.write_text(GOOD_STORY.replace("A day", "Ein Tag \u2600"), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "bachvid", "plan", str(path), "--set", f"model.id={model}"],
        capture_output=True,
        env={"PYTHONIOENCODING": "latin-1"},
    )
    assert result.returncode == 0
    assert result.stdout.startswith(b'"Ein Tag \\u2600": 1 scene')


def test_render_makes_every_video_and_says_so(
    story: Path, tmp_path: Path, tiny_cogvideox_folder: Path
) -> None:
    out = tmp_path / "run"
    result = run("render", story, "--out", out, *settings_for(tiny_cogvideox_folder))
    assert (result.exit_code, result.stdout) == (0, "")
    assert sorted(path.name for path in (out / "street").glob("*.mp4")) == [
        "identity.mp4",
        "jumps.mp4",
        "runs.mp4",
    ]
    *stages, last = result.stderr.splitlines()
    videos = ["street", "street/identity", "street/runs", "street/jumps"]
    assert [line.split(":")[0] for line in stages] == videos
    assert last == f"3 of 3 videos in {out}"


def test_rendering_again_finds_everything_done(
    story: Path, tmp_path: Path, tiny_cogvideox_folder: Path
) -> None:
    out = tmp_path / "run"
    settings = settings_for(tiny_cogvideox_folder)
    args: tuple[str | Path, ...] = ("render", story, "--out", out, *settings)
    run(*args)
    result = run(*args)
    assert result.exit_code == 0
    assert [line.split(", ")[0] for line in result.stderr.splitlines()] == [
        *(f"street/{video}: done before" for video in ("identity", "runs", "jumps")),
        f"3 of 3 videos in {out}",
    ]


def test_evaluate_prints_a_table_and_keeps_the_results(
    story: Path, tmp_path: Path, tiny_cogvideox_folder: Path
) -> None:
    out = tmp_path / "run"
    run("render", story, "--out", out, *settings_for(tiny_cogvideox_folder))
    result = run("evaluate", out, "--against", "none")
    assert result.exit_code == 0
    assert "PSNR-BG" in result.stdout
    assert "bachvid - none" in result.stdout
    assert (out / "metrics.parquet").exists()
    again = run("evaluate", out, "--against", "none", "--json")
    assert json.loads(again.stdout) == json.loads((out / "metrics.json").read_text())


def test_evaluating_what_is_no_run_is_bad_input(tmp_path: Path) -> None:
    result = run("evaluate", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {tmp_path} is no run directory")


def test_a_directory_of_another_story_is_bad_input(
    story: Path, tmp_path: Path, tiny_cogvideox_folder: Path
) -> None:
    settings = settings_for(tiny_cogvideox_folder)
    args: tuple[str | Path, ...] = ("render", story, "--out", tmp_path / "run", *settings)
    run(*args)
    story.write_text(STORY.replace("A walk", "A run"))
    result = run(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_ctrl_c_ends_after_the_step_and_rendering_goes_on_later(
    story: Path, tmp_path: Path, tiny_cogvideox_folder: Path
) -> None:
    args = ["render", str(story), "--out", str(tmp_path / "run")]
    args += settings_for(tiny_cogvideox_folder, num_steps=60)
    command = [sys.executable, "-m", "bachvid", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        process.wait(timeout=60)
    assert lines[0].startswith("street: ")  # keys and values
    assert lines[1].startswith("street/identity: ")
    assert process.returncode == 130
    done, end = rest.splitlines()[-2:]
    # The next one may be over by the time that the first one is written.
    assert re.fullmatch(rf"[12] of 3 videos in {tmp_path / 'run'}", done)
    assert end == "Cancelled; render again to go on."
    assert "Traceback" not in rest
    result = run(*args)
    assert result.exit_code == 0
    assert result.stderr.startswith("street/identity: done before")
