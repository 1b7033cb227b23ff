"""Whatever is wrong with a story or a config is said exactly, and never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_inputs import BAD_CONFIGS, BAD_EDITS, BAD_OVERRIDES, BAD_STORIES, GOOD_STORY
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_models import write_json_model

from bachvid.cli.main import main


class Desk:
    """A folder with a story, a config and a model, and `bachvid plan` on them."""

    def __init__(self, folder: Path) -> None:
        self.story, self.config = folder / "story.yaml", folder / "config.yaml"
        self.model = write_json_model(folder / "model", with_vocabulary=True)

    def plan(self, story: str | bytes, *options: str) -> Result:
        self.story.write_bytes(story if isinstance(story, bytes) else story.encode())
        return CliRunner().invoke(main, ["plan", str(self.story), *options])

    def refusal(self, story: str | bytes, *options: str) -> str:
        """Return the message, with the names of the files for their paths."""
        result = self.plan(story, *options)
        assert result.exit_code == 2
        assert isinstance(result.exception, SystemExit)  # no other reached the top
        assert result.stdout == ""
        message = result.stderr.removeprefix("Error: ").removesuffix("\n")
        return message.replace(str(self.story), "STORY").replace(str(self.config), "CONFIG")

    @property
    def with_model(self) -> tuple[str, str]:
        return "--set", f"model.id={self.model}"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


def test_the_good_story_is_planned(desk: Desk) -> None:
    result = desk.plan(GOOD_STORY, *desk.with_model)
    assert result.exit_code == 0
    assert "a desert, a green robot, jumps" in result.stdout


@pytest.mark.parametrize("name", BAD_STORIES)
def test_a_bad_story_gets_its_message(desk: Desk, name: str) -> None:
    story, message = BAD_STORIES[name]
    assert desk.refusal(story, *desk.with_model) == message


@pytest.mark.parametrize("name", BAD_EDITS)
def test_a_bad_edit_of_a_story_gets_its_message(desk: Desk, name: str) -> None:
    old, new, message = BAD_EDITS[name]
    assert old in GOOD_STORY
    assert desk.refusal(GOOD_STORY.replace(old, new, 1), *desk.with_model) == message


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_gets_its_message(desk: Desk, name: str) -> None:
    config, message = BAD_CONFIGS[name]
    desk.config.write_text(config)
    model = () if "id:" in config else desk.with_model
    assert desk.refusal(GOOD_STORY, "--config", str(desk.config), *model) == message


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_bad_override_gets_its_message(desk: Desk, override: str) -> None:
    assert desk.refusal(GOOD_STORY, *desk.with_model, "--set", override) == BAD_OVERRIDES[override]


def test_text_that_is_not_utf_8_is_refused(desk: Desk) -> None:
    message = "STORY: not UTF-8 text (byte 10); save it as UTF-8"
    assert desk.refusal("title: caf\u00e9".encode("latin-1"), *desk.with_model) == message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.yaml", "no such file"),
        ("folder.yaml", "is a folder, not a file"),
        ("story.json", "a story is a .yaml file, or a .txt file of prompts"),
    ],
)
def test_a_path_that_is_no_story_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    result = CliRunner().invoke(main, ["plan", str(tmp_path / name)])
    assert (result.exit_code, result.stderr) == (2, f"Error: {tmp_path / name}: {reason}\n")


def test_a_prompt_longer_than_the_model_reads_is_refused(tmp_path: Path) -> None:
    model = write_json_model(tmp_path / "model", with_vocabulary=False)
    story = tmp_path / "story.yaml"
    story.write_text(GOOD_STORY.replace("a green robot", "a green robot " * 5))
    result = CliRunner().invoke(main, ["plan", str(story), "--set", f"model.id={model}"])
    rule = "the model reads 20; shorten it by"
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"Error: {story}: scenes[0].identity: the prompt has 22 tokens: {rule} 2",
        f"{story}: scenes[0].actions[0].text: the prompt has 22 tokens: {rule} 2",
        f"{story}: scenes[0].actions[1].text: the prompt has 21 tokens: {rule} 1",
    ]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["a desert", "jumps", "identity", "title", "actions", "../x", "\x00"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated_stories(draw: st.DrawFn) -> str:
    """A valid story in which one place holds another value, other text, or nothing."""
    story = yaml.safe_load(GOOD_STORY)
    places = _places(story)
    container, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        container[key] = draw(VALUES)
    elif isinstance(container, dict) and draw(st.booleans()):
        container[draw(st.text(max_size=9))] = container.pop(key)
    else:
        del container[key]
    return str(yaml.safe_dump(story, allow_unicode=draw(st.booleans())))


def _places(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    inner = [place for key in keys for place in _places(value[key])]
    return [(value, key) for key in keys] + inner


# The folder is shared by all examples on purpose: each writes the same one file again.
QUICK = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(story=mutated_stories())
def test_a_mutated_story_is_planned_or_refused(desk: Desk, story: str) -> None:
    check_planned_or_refused(desk, story.encode("utf-8", "surrogatepass"))


@QUICK
@given(data=st.data())
def test_damaged_bytes_are_planned_or_refused(desk: Desk, data: st.DataObject) -> None:
    story = GOOD_STORY.encode()
    start = data.draw(st.integers(0, len(story)))
    stop = data.draw(st.integers(start, min(start + 20, len(story))))
    check_planned_or_refused(desk, story[:start] + data.draw(st.binary(max_size=8)) + story[stop:])


def check_planned_or_refused(desk: Desk, story: bytes) -> None:
    result = desk.plan(story, *desk.with_model)
    if result.exit_code != 0:
        assert result.exit_code == 2
        assert isinstance(result.exception, SystemExit)
        assert result.stderr.startswith(f"Error: {desk.story}")
