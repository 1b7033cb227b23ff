"""A new method is one file and one line, a new model two files and two lines: nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy_method

from bachvid import RenderConfig, Story, StoryRenderer
from bachvid.driver.events import Done, Failed
from bachvid.metrics.evaluate import evaluate_run
from bachvid.output.journal import read_run
from bachvid.planning.plan import render_plan
from bachvid.planning.text import plan_text

STORY = Story.model_validate(
    {
        "title": "Toys",
        "seed": 3,
        "scenes": [
            {
                "id": "forest",
                "background": "a snowy forest",
                "character": "a girl with a yellow coat",
                "identity": "runs",
                "actions": ["jumps", "waves"],
            }
        ],
    }
)
VIDEOS = {("forest", "identity"), ("forest", "jumps"), ("forest", "waves")}


def toy_folder(cogvideox: Path, copy: Path) -> Path:
    """Make a folder of the toy family."""
    shutil.copytree(cogvideox, copy)
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "ToyPipeline"}))
    return copy


def settings(folder: Path, *overrides: str) -> RenderConfig:
    given = (f"model.id={folder}", "model.threads=1", "sampling.num_steps=3", *overrides)
    return RenderConfig.from_yaml(None, ("method.name=toy", *given))


def render(config: RenderConfig, out: Path, *, address: str | None = None) -> dict[str, str]:
    """Render the story; return the hashes of its latents."""
    with StoryRenderer(config, out, address=address) as renderer:
        events = list(renderer.stream(STORY))
    assert not [event for event in events if isinstance(event, Failed)]
    assert {(e.scene, e.video) for e in events if isinstance(e, Done)} == VIDEOS
    return {video: record.latents_sha256 for (_, video), record in read_run(out).records.items()}


toy_method.unregister()  # all other tests see the registries of the package


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    toy_method.register()
    yield
    toy_method.unregister()


@pytest.fixture
def folder(tiny_cogvideox_folder: Path, tmp_path: Path) -> Path:
    return toy_folder(tiny_cogvideox_folder, tmp_path / "toy")


def test_both_toys_are_planned_and_rendered_in_this_process(
    folder: Path, tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    plan = render_plan(STORY, settings(folder))
    assert plan.facts.family == "toy"
    assert plan.cache_bytes == 2 * 72 * 32 * 4  # the values of two layers, one step, one branch
    assert "method    toy" in plan_text(plan)
    toys = render(settings(folder), tmp_path / "toys")
    files = {path.name for path in (tmp_path / "toys" / "forest").iterdir()}
    assert files == {"identity.mp4", "jumps.mp4", "waves.mp4", "contact-sheet.png"}

    weak = render(settings(folder, "method.strength=0"), tmp_path / "weak")
    none = render(
        settings(folder).model_copy(
            update={"method": RenderConfig.from_yaml(None, ["method.name=none"]).method}
        ),
        tmp_path / "none",
    )
    assert weak == none  # blended by nothing, it is the model alone
    assert toys["identity"] == none["identity"]
    assert toys["jumps"] != none["jumps"]
    other = render(settings(tiny_cogvideox_folder), tmp_path / "other")
    assert not set(other.values()) & set(toys.values())


def test_a_run_of_a_method_without_masks_is_measured_as_far_as_it_can_be(
    folder: Path, tmp_path: Path
) -> None:
    render(settings(folder), tmp_path / "run")
    evaluation = evaluate_run(tmp_path / "run")
    assert evaluation.summary("rendered") is not None
    assert evaluation.summary("psnr_bg") is None
    assert any("no masks" in note for note in evaluation.notes)


def test_a_method_of_one_file_imports_no_torch() -> None:
    code = "import sys, toy_method; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(toy_method.__file__).parent,
    )
    assert found.stdout.strip() == "False"
