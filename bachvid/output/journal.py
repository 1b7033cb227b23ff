"""Reads the journal of a run: the story and config of the run, and which videos are done.

For all readers of a run directory; `bachvid.output.run_directory` is its only writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from bachvid.errors import BachvidError, ConfigError

JOURNAL = "journal.jsonl"

JsonObject = dict[str, JsonValue]


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """The journal's record of one finished video; paths are relative to the run."""

    scene: str
    video: str
    prompt: str
    seed: int
    latents_sha256: str
    frames_sha256: str
    files: Mapping[str, str]  # path -> sha256 of its bytes
    seconds: Mapping[str, float] = field(default_factory=dict)
    cache_bytes: int = 0
    recoveries: Sequence[str] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)  # versions and device


@dataclass(frozen=True, slots=True)
class RunHeader:
    """The first line of the journal: story and config of the run."""

    story: JsonObject
    config: JsonObject
    story_hash: str
    config_hash: str
    bachvid: str


@dataclass(frozen=True, slots=True)
class RunContents:
    """A run as recorded in its journal."""

    path: Path
    header: RunHeader
    records: Mapping[tuple[str, str], VideoRecord]
    failures: Mapping[tuple[str, str], str]  # videos whose last attempt failed

    def file(self, scene: str, video: str, suffix: str) -> Path | None:
        """Return the one file of a video that ends with `suffix`, if it was written."""
        record = self.records.get((scene, video))
        names = [name for name in (record.files if record else ()) if name.endswith(suffix)]
        return self.path / names[0] if names else None


def read_run(path: Path) -> RunContents:
    """Return the contents of a run directory, without locking it.

    Raises ConfigError if `path` is no run directory.
    """
    lines, _ = read_lines(path / JOURNAL)
    if not lines:
        raise ConfigError(
            f"{path} is no run directory: it has no {JOURNAL} with a first line; "
            f"give the folder that `bachvid render --out` wrote"
        )
    return contents_of(path, lines)


def read_lines(path: Path) -> tuple[list[JsonObject], int]:
    """Return the whole lines of a journal and the bytes that they take.

    The last line may be torn by a crash and is left out. Raises BachvidError if another is.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    lines: list[JsonObject] = []
    size = 0
    rows = raw.splitlines(keepends=True)
    for number, row in enumerate(rows, start=1):
        try:
            line = json.loads(row)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not row.endswith(b"\n"):
            if number == len(rows):
                break
            raise BachvidError(
                f"{path}:{number} is damaged, and it is not the last line: a crash does not do "
                f"this; restore the file or render into another folder"
            )
        lines.append(line)
        size += len(row)
    return lines, size


def contents_of(path: Path, lines: Sequence[JsonObject]) -> RunContents:
    """Parse the lines of a journal. Raises ConfigError if they are another program's."""
    first, *rest = lines
    try:
        header = RunHeader(**_fields(first, "run"))  # type: ignore[arg-type]
        records: dict[tuple[str, str], VideoRecord] = {}
        failures: dict[tuple[str, str], str] = {}
        for line in rest:
            if line["event"] == "video":
                record = VideoRecord(**_fields(line, "video"))  # type: ignore[arg-type]
                records[record.scene, record.video] = record
                failures.pop((record.scene, record.video), None)
            else:
                fields = _fields(line, "failed")
                failures[str(fields["scene"]), str(fields["video"])] = str(fields["error"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path / JOURNAL} was not written by this version of bachvid ({error}); render "
            f"into another folder"
        ) from None
    return RunContents(path, header, records, failures)


def _fields(line: JsonObject, event: str) -> JsonObject:
    if line.get("event") != event:
        raise ValueError(f"an event {line.get('event')!r} where {event!r} is expected")
    return {key: value for key, value in line.items() if key != "event"}
