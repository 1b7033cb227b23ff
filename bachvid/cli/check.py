"""`bachvid check`: looks at this machine, and renders a little with the embedded model."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bachvid import __version__
from bachvid.catalog.registry import EMBEDDED, load_facts
from bachvid.errors import BachvidError, WorkerError
from bachvid.inputs.sections import ModelConfig
from bachvid.inputs.story import Action, Scene, Story
from bachvid.planning.config import RenderConfig
from bachvid.units import format_bytes

_PACKAGES = ("torch", "diffusers", "transformers", "ray", "av")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of `bachvid check`; `found` is what was seen, or what to do about it."""

    name: str
    ok: bool
    found: str


def run_checks() -> Iterator[CheckResult]:
    """Run the checks one after another, the slow ones last."""
    checks: dict[str, Callable[[], str]] = {
        "versions": _versions,
        "devices": _devices,
        "H.264 encoder": _encoder,
        "embedded model": _weights,
        "small render": _small_render,
    }
    for name, find in checks.items():
        try:
            yield CheckResult(name, True, find())
        except (BachvidError, ImportError) as error:
            yield CheckResult(name, False, str(error))


def _versions() -> str:
    found = [f"bachvid {__version__}", f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            raise WorkerError(f"{package} is not installed; run `make setup`") from None
    return ", ".join(found)


def _devices() -> str:
    import torch

    found = [f"{torch.get_num_threads()} CPU threads"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(f"{device.name} with {format_bytes(device.total_memory)}")
    return ", ".join(found)


def _encoder() -> str:
    import av

    if "libx264" not in av.codecs_available:
        raise WorkerError(f"PyAV {av.__version__} has no libx264; install it from its wheel")
    return "libx264"


def _weights() -> str:
    weights = []
    for folder in EMBEDDED.values():
        found = sorted(folder.rglob("*.safetensors"))
        if not found:
            raise WorkerError(f"no weights in {folder}; install bachvid again")
        weights += found
    size = sum(path.stat().st_size for path in weights)
    return f"{format_bytes(size)} in {len(weights)} files"


def _small_render() -> str:
    from bachvid.driver.events import Failed
    from bachvid.driver.renderer import StoryRenderer

    vocabulary = load_facts(ModelConfig()).vocabulary
    assert vocabulary is not None
    words = vocabulary.action[0]
    scene = Scene(
        id="check",
        background=vocabulary.background[0],
        character=vocabulary.character[0],
        identity=words,
        actions=(Action(id="check", text=words),),
    )
    config = RenderConfig.from_yaml(None, ["sampling.num_steps=4"])
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        StoryRenderer(config, Path(folder) / "run") as renderer,
    ):
        for event in renderer.stream(Story(title="check", scenes=(scene,))):
            if isinstance(event, Failed):
                raise WorkerError(event.error)
    return f"2 videos of 4 steps in {time.perf_counter() - start:.1f} s"
