"""The run directory: which videos are finished, and which files belong to them. Safe in a crash.

    RUN/.lock                       held by the one renderer that may write here
    RUN/journal.jsonl               first line: story and config; then one line per video
    RUN/manifest.json               the same for readers: prompts, seeds, timings, hashes
    RUN/<scene>/<video>.mp4         <video> is `identity` or an action's id
    RUN/<scene>/masks/<video>.npz   key `foreground`: the method's mask, in tokens
    RUN/<scene>/overlays/           <video>.mask.png, <video>.match.png
    RUN/<scene>/previews/           <video>.png, with output.preview_every; not journaled
    RUN/<scene>/frames/<video>.npz  with output.frames: keys `frames` and `foreground`, in pixels,
                                    and `latents`

A video is done when its journal line exists and every file named there has the bytes that the
line says. Done videos are never written again. Knows no model and imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from pydantic import JsonValue

from bachvid.atomic import content_sha256, sync_folder, write_atomically
from bachvid.errors import ConfigError, WorkerError
from bachvid.output.journal import (
    JOURNAL,
    JsonObject,
    RunContents,
    RunHeader,
    VideoRecord,
    contents_of,
    read_lines,
)
from bachvid.planning.config import INDECISIVE

MANIFEST = "manifest.json"
LOCK = ".lock"
_ID = re.compile(r"[a-z0-9][a-z0-9_-]*")
_FIXED_OUTPUT = ("min_height", "fps", "crf")  # these shape the files that are already there


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and its like into a WorkerError that says what to do."""
    try:
        yield
    except OSError as error:
        raise WorkerError(
            f"cannot write {path}: {error}; what is journaled is safe: make room, or give another "
            f"--out, and render again"
        ) from error


class RunDirectory:
    """The only writer of a run directory. A context manager: it holds the lock."""

    def __init__(self, path: Path, header: RunHeader) -> None:
        """Open or create `path` for this story and config.

        Raises ConfigError if another renderer holds it, if it belongs to another story or
        config, or if it holds files but no run.
        """
        self.path = path
        self.header = header
        _check_is_ours(path)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path / LOCK)
        try:
            lines, size = read_lines(path / JOURNAL)
            if lines:
                contents = contents_of(path, lines)
                _check_same_run(path, contents.header, header)
                self._records = dict(contents.records)
                self._failures = dict(contents.failures)
            else:
                self._records, self._failures = {}, {}
            # Without a buffer: after an error nothing half written can follow later.
            self._journal = (path / JOURNAL).open("ab", buffering=0)
            if self._journal.seek(0, os.SEEK_END) > size:
                self._journal.truncate(size)  # a line that a crash tore is no line
            self._size = size
            if not lines:
                self._append({"event": "run", **asdict(header)})
                sync_folder(path)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if not self._journal.closed:
            self._journal.close()
            os.close(self._lock)

    @property
    def contents(self) -> RunContents:
        """The run as recorded so far."""
        return RunContents(self.path, self.header, dict(self._records), dict(self._failures))

    def file(self, scene: str, *parts: str) -> Path:
        """Return the path of a scene's file. Raises ConfigError if an id would leave the run."""
        if not _ID.fullmatch(scene):
            raise ConfigError(f"scene id {scene!r}: ids are made of a-z, 0-9, _ and -")
        for part in parts:
            if not all(_ID.fullmatch(piece) for piece in part.split(".")):
                raise ConfigError(f"{part!r} is no file name of a run: ids are a-z, 0-9, _ and -")
        return self.path.joinpath(scene, *parts)

    def record(self, scene: str, video: str) -> VideoRecord | None:
        """Return the journal's line of a video, whether or not its files are still whole."""
        return self._records.get((scene, video))

    def missing(self, scene: str, video: str, wanted: Sequence[Path]) -> list[Path]:
        """Return the `wanted` files that are not there with the bytes that the journal says."""
        record = self.record(scene, video)
        known = record.files if record else {}
        return [path for path in wanted if not self._is_whole(path, known)]

    def commit(self, record: VideoRecord) -> None:
        """Journal a video whose files are all written: from then on it is done."""
        self._append({"event": "video", **asdict(record)})
        self._records[record.scene, record.video] = record
        self._failures.pop((record.scene, record.video), None)

    def commit_failure(self, scene: str, video: str, error: str) -> None:
        """Journal that an attempt failed; rendering again tries it again."""
        self._append({"event": "failed", "scene": scene, "video": video, "error": error})
        self._failures[scene, video] = error

    def write_manifest(self) -> None:
        """Write `manifest.json`: the last state of every video in the journal."""
        manifest: JsonObject = {
            **asdict(self.header),
            "videos": [asdict(record) for record in self._records.values()],
            "failed": [
                {"scene": scene, "video": video, "error": error}
                for (scene, video), error in self._failures.items()
            ],
        }
        text = json.dumps(manifest, indent=2) + "\n"
        write_atomically(self.path / MANIFEST, lambda path: _write_text(path, text))

    def relative(self, path: Path) -> str:
        """Return `path` as the journal names it."""
        return path.relative_to(self.path).as_posix()

    def _is_whole(self, path: Path, known: Mapping[str, str]) -> bool:
        expected = known.get(self.relative(path))
        return expected is not None and path.is_file() and content_sha256(path) == expected

    def _append(self, line: Mapping[str, object]) -> None:
        data = json.dumps(line, sort_keys=True).encode() + b"\n"
        try:
            if self._journal.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / JOURNAL))
            os.fsync(self._journal.fileno())
        except OSError:
            self._journal.truncate(self._size)  # the next line must not continue this one
            raise
        self._size += len(data)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _lock(path: Path) -> int:
    """Lock `path`. The kernel releases the lock when the process ends, even by kill -9."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 32).decode() or "unknown"
        os.close(handle)
        raise ConfigError(
            f"{path.parent} is being written by another renderer (process {holder}): wait for "
            f"it, stop it, or give another --out"
        ) from None
    os.truncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    return handle


def _check_is_ours(path: Path) -> None:
    """Refuse a folder that holds something, but no run."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file: give a folder as --out")
    found = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    foreign = [name for name in found if name not in (LOCK, JOURNAL)]
    if foreign and JOURNAL not in found:
        raise ConfigError(
            f"{path} holds files but no run ({', '.join(foreign[:3])}{', ...' * (len(foreign) > 3)}"
            f"): give a new or empty folder as --out"
        )


def _check_same_run(path: Path, there: RunHeader, here: RunHeader) -> None:
    """Refuse to continue another story, another config or other file settings."""
    differences = []
    if there.story_hash != here.story_hash:
        differences += [f"story.{text}" for text in _differences(there.story, here.story)]
    if there.config_hash != here.config_hash:
        differences += _differences(_pixels(there.config), _pixels(here.config))
    for key in _FIXED_OUTPUT:
        old, new = _output(there.config).get(key), _output(here.config).get(key)
        if old != new:
            differences.append(f"output.{key} was {json.dumps(old)}, is {json.dumps(new)}")
    if differences or there.story_hash != here.story_hash or there.config_hash != here.config_hash:
        shown = "; ".join(differences[:4] or ["the model's files differ"])
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ConfigError(
            f"{path} belongs to another run: {shown}{more}. Give another --out, or the story "
            f"and config that it was started with"
        )


def _output(config: JsonObject) -> JsonObject:
    output = config.get("output")
    return output if isinstance(output, dict) else {}


def _pixels(config: JsonObject) -> JsonObject:
    """Return the part of a config that may not change between two renders into one folder."""
    model = config.get("model")
    kept = model.items() if isinstance(model, dict) else ()
    of_model: JsonObject = {key: v for key, v in kept if key not in ("threads", "device")}
    return {key: value for key, value in config.items() if key not in INDECISIVE} | {
        "model": of_model
    }


def _differences(there: JsonValue, here: JsonValue, where: str = "") -> list[str]:
    """Name every value that differs, by its path."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            text
            for key in sorted(there.keys() | here.keys())
            for text in _differences(there.get(key), here.get(key), f"{where}.{key}".lstrip("."))
        ]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        return [text for i, (old, new) in pairs for text in _differences(old, new, f"{where}[{i}]")]
    return [] if there == here else [f"{where} was {_short(there)}, is {_short(here)}"]


def _short(value: JsonValue) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
