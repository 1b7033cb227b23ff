"""The run directory: nothing done is lost or redone, and nobody else's folder is touched."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import JsonValue

from bachvid.atomic import content_sha256, write_atomically
from bachvid.errors import BachvidError, ConfigError
from bachvid.output.journal import JOURNAL, RunHeader, VideoRecord, read_run
from bachvid.output.run_directory import RunDirectory

HEADER = RunHeader(
    story={"title": "t", "scenes": [{"id": "s", "actions": ["jumps", "waves"]}]},
    config={"output": {"crf": 16, "frames": False}, "sampling": {"num_steps": 3}},
    story_hash="a",
    config_hash="b",
    bachvid="0.1.0",
)


def render(run: RunDirectory, video: str, content: str = "x") -> VideoRecord:
    path = run.file("s", f"{video}.mp4")
    digest = write_atomically(path, lambda path: _write(path, content))
    record = VideoRecord(
        scene="s",
        video=video,
        prompt="p",
        seed=1,
        latents_sha256="l",
        frames_sha256="f",
        files={run.relative(path): digest},
        seconds={"main_run": 1.0},
        recoveries=("empty mask",),
    )
    run.commit(record)
    return record


def _write(path: Path, content: str) -> None:
    path.write_text(content)


def test_a_committed_video_is_done_for_the_next_renderer(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", HEADER) as run:
        record = render(run, "jumps")
    with RunDirectory(tmp_path / "run", HEADER) as run:
        assert not run.missing("s", "jumps", [run.file("s", "jumps.mp4")])
        assert run.missing("s", "waves", [run.file("s", "waves.mp4")])
        assert run.missing("s", "jumps", [run.file("s", "frames", "jumps.npz")])
        found = run.record("s", "jumps")
    assert found is not None
    assert found.files == record.files
    assert found.seconds == record.seconds
    assert tuple(found.recoveries) == ("empty mask",)


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_video_whose_file_is_not_whole_is_not_done(tmp_path: Path, damage: str) -> None:
    with RunDirectory(tmp_path / "run", HEADER) as run:
        render(run, "jumps")
        path = run.file("s", "jumps.mp4")
        if damage == "gone":
            path.unlink()
        else:
            path.write_text("y")
        assert run.missing("s", "jumps", [path]) == [path]


@pytest.mark.parametrize("torn", ['{"event": "vid', '{"event": "failed"}', "\0\0\0\n", "7\n"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    with RunDirectory(tmp_path / "run", HEADER) as run:
        render(run, "jumps")
    with (tmp_path / "run" / JOURNAL).open("a") as journal:
        journal.write(torn)
    with RunDirectory(tmp_path / "run", HEADER) as run:
        render(run, "waves")
    assert {video for _, video in read_run(tmp_path / "run").records} == {"jumps", "waves"}


def test_a_damaged_line_before_the_last_is_an_error(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", HEADER) as run:
        render(run, "jumps")
        render(run, "waves")
    journal = tmp_path / "run" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(lines[0] + lines[1][:20] + "\n" + lines[2])
    with pytest.raises(BachvidError, match=r"journal\.jsonl:2 is damaged"):
        RunDirectory(tmp_path / "run", HEADER)


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", JOURNAL]])
def test_a_run_that_died_at_its_birth_is_continued(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text('{"event": "ru' if name == JOURNAL else "1")
    with RunDirectory(tmp_path, HEADER) as run:
        render(run, "jumps")
    assert len(read_run(tmp_path).records) == 1


def test_another_story_or_config_is_refused_by_name(tmp_path: Path) -> None:
    RunDirectory(tmp_path, HEADER).close()
    scene: dict[str, JsonValue] = {"id": "s", "actions": ["jumps", "sits"]}
    story: dict[str, JsonValue] = {"title": "t", "scenes": [scene]}
    with pytest.raises(ConfigError) as refused:
        RunDirectory(tmp_path, replace(HEADER, story=story, story_hash="c"))
    assert str(refused.value) == (
        f'{tmp_path} belongs to another run: story.scenes[0].actions[1] was "waves", is "sits". '
        f"Give another --out, or the story and config that it was started with"
    )
    config: dict[str, JsonValue] = {**HEADER.config, "sampling": {"num_steps": 4}}
    with pytest.raises(ConfigError, match=r"sampling\.num_steps was 3, is 4\."):
        RunDirectory(tmp_path, replace(HEADER, config=config, config_hash="c"))
    config |= {"cache": {"window": 2}, "cluster": {"workers": 3}}  # both may change
    with pytest.raises(ConfigError, match=r"another run: sampling\.num_steps was 3, is 4\. Give"):
        RunDirectory(tmp_path, replace(HEADER, config=config, config_hash="c"))
    with pytest.raises(ConfigError, match="the model's files differ"):
        RunDirectory(tmp_path, replace(HEADER, config_hash="c"))


def test_output_may_add_files_but_not_change_those_there(tmp_path: Path) -> None:
    RunDirectory(tmp_path, HEADER).close()
    more: dict[str, JsonValue] = {**HEADER.config, "output": {"crf": 16, "frames": True}}
    RunDirectory(tmp_path, replace(HEADER, config=more)).close()
    other: dict[str, JsonValue] = {**HEADER.config, "output": {"crf": 20, "frames": False}}
    with pytest.raises(ConfigError, match=r"output\.crf was 16, is 20\."):
        RunDirectory(tmp_path, replace(HEADER, config=other))


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"holds files but no run \(thesis\.tex\)"):
        RunDirectory(tmp_path, HEADER)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    path = tmp_path / "thesis.tex"
    path.write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        RunDirectory(path, HEADER)


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text('{"line": 1}\n')
    with pytest.raises(ConfigError, match="was not written by this version"):
        RunDirectory(tmp_path, HEADER)


def test_two_renderers_cannot_write_one_directory(tmp_path: Path) -> None:
    with (
        RunDirectory(tmp_path, HEADER),
        pytest.raises(ConfigError, match=rf"another renderer \(process {os.getpid()}\)"),
    ):
        RunDirectory(tmp_path, HEADER)
    RunDirectory(tmp_path, HEADER).close()


@pytest.mark.parametrize("scene", ["..", "a/b", "", "A", "/etc", ".lock"])
def test_no_id_leaves_the_run_directory(tmp_path: Path, scene: str) -> None:
    with RunDirectory(tmp_path, HEADER) as run:
        with pytest.raises(ConfigError):
            run.file(scene, "jumps.mp4")
        with pytest.raises(ConfigError):
            run.file("s", f"{scene}.mp4")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, lambda path: _write(path, "old"))

    def fail(path: Path) -> None:
        _write(path, "half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    assert write_atomically(path, lambda path: _write(path, "new")) == content_sha256(path)


def test_a_failure_is_journaled_until_the_video_is_done(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, HEADER) as run:
        run.commit_failure("s", "jumps", "no memory")
    assert read_run(tmp_path).failures == {("s", "jumps"): "no memory"}
    with RunDirectory(tmp_path, HEADER) as run:
        render(run, "jumps")
        run.write_manifest()
    assert not read_run(tmp_path).failures
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [video["video"] for video in manifest["videos"]] == ["jumps"]
    assert manifest["config_hash"] == "b"


def test_a_folder_without_a_run_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run directory"):
        read_run(tmp_path)


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_run_directory import HEADER, RunDirectory, render
with RunDirectory(Path(sys.argv[1]), HEADER) as run:
    for index in range(40):
        video = f"v{index}"
        if run.missing("s", video, [run.file("s", f"{video}.mp4")]):
            print(video, flush=True)
            render(run, video, content=video * 2000)
"""


def test_killed_at_any_moment_every_video_is_committed_once(tmp_path: Path) -> None:
    """Kill -9 at random moments: what was journaled stays, and is not written again."""
    chance = random.Random(0)
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run"), str(Path(__file__).parent)]
    kills = 0
    for _ in range(60):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(chance.randint(1, 8)):
                process.stdout.readline()
            time.sleep(chance.random() * 0.002)
            process.send_signal(signal.SIGKILL)
        if process.returncode == 0:
            break
        kills += 1
    assert kills >= 4
    run = read_run(tmp_path / "run")
    assert len(run.records) == 40
    rows = [json.loads(row) for row in (tmp_path / "run" / JOURNAL).read_text().splitlines()]
    assert len(rows) == 41  # no video twice
    for record in run.records.values():
        for name, digest in record.files.items():
            assert content_sha256(run.path / name) == digest
