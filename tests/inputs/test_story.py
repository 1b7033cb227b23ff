"""Stories: defaults, import of prompt files, seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from bachvid.errors import ConfigError
from bachvid.inputs.story import Action, Scene, Story, video_seed

EXAMPLES = Path(__file__).parents[2] / "examples"
YAML = """\
title: A day
seed: 5
scenes:
- id: coast
  background: |
    a rocky coast
    with a lighthouse
  character: a girl in a yellow dress
  actions:
  - Walks to the right!
  - {id: hop, text: jumps, seed: 3}
"""


@pytest.fixture
def story(tmp_path: Path) -> Story:
    path = tmp_path / "story.yaml"
    path.write_text(YAML)
    return Story.load(path)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_loads(path: Path) -> None:
    assert Story.load(path).scenes


def test_the_examples_have_the_sizes_that_they_promise() -> None:
    (scene,) = Story.load(EXAMPLES / "lighthouse.yaml").scenes
    assert len(scene.actions) == 4
    scenes = Story.load(EXAMPLES / "six_scenes.yaml").scenes
    assert [len(scene.actions) for scene in scenes] == [5] * 6
    assert len({scene.background for scene in scenes}) == 6
    assert len({scene.character for scene in scenes}) == 6


def test_a_plain_action_gets_an_id_from_its_text(story: Story) -> None:
    assert [action.id for action in story.scenes[0].actions] == ["walks-to-the-right", "hop"]


def test_the_identity_video_shows_the_first_action_by_default(story: Story) -> None:
    assert story.scenes[0].identity == "Walks to the right!"


def test_white_space_is_folded(story: Story) -> None:
    assert story.scenes[0].background == "a rocky coast with a lighthouse"


def test_accents_leave_letters_in_an_id() -> None:
    assert Action.model_validate("saute \u00e0 c\u00f4t\u00e9").id == "saute-a-cote"


def test_an_id_is_cut_at_64_characters() -> None:
    assert Action.model_validate("walks " * 20).id == ("walks-" * 20)[:64].strip("-")


def test_a_prompts_file_is_scenes_between_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "gym_day.txt"
    path.write_text("\n a gym # a man#lifts\na gym#a man# drinks\n\n\na park#a dog#runs\n")
    assert Story.load(path) == Story(
        title="gym day",
        scenes=(
            Scene(
                id="scene-1",
                background="a gym",
                character="a man",
                identity="lifts",
                actions=(Action(id="lifts", text="lifts"), Action(id="drinks", text="drinks")),
            ),
            Scene(
                id="scene-2",
                background="a park",
                character="a dog",
                identity="runs",
                actions=(Action(id="runs", text="runs"),),
            ),
        ),
    )


def test_the_example_of_a_prompts_file_loads() -> None:
    scenes = Story.load(EXAMPLES / "two_scenes.txt").scenes
    assert [(scene.id, len(scene.actions)) for scene in scenes] == [("scene-1", 3), ("scene-2", 2)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a#b", ":1: has 2 segments between '#': a line is background#character#action"),
        ("\na#b#c#d", ":2: has 4 segments between '#': a line is background#character#action"),
        ("a# #c", ":1: the character is empty; describe what should be visible"),
        (
            "a#b#c\na#x#d",
            ":2: background and character are not those of the line above; "
            "put a blank line before a new scene",
        ),
        ("", ": scenes: is empty; a story needs at least one scene"),
        (
            "a#b#c\na#b#c",
            ": scenes[0].actions: [0] and [1] have the same id 'c'; give each action its own id",
        ),
    ],
)
def test_a_bad_prompts_file_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(lines)
    with pytest.raises(ConfigError) as caught:
        Story.load(path)
    assert str(caught.value) == f"{path}{message}"


def seeds(story: Story, noise: str) -> list[int]:
    (scene,) = story.scenes
    return [
        video_seed(story, scene, action, "same" if noise == "same" else "independent")
        for action in (None, *scene.actions)
    ]


def test_the_same_noise_is_one_seed_unless_an_action_has_its_own(story: Story) -> None:
    identity, first, second = seeds(story, "same")
    assert first == identity
    assert second == 3


def test_independent_noise_is_a_seed_for_each_video(story: Story) -> None:
    identity, first, second = seeds(story, "independent")
    assert len({identity, first, 3}) == 3
    assert second == 3


def test_seeds_are_those_of_every_version(story: Story) -> None:
    assert seeds(story, "same") == [2260966111, 2260966111, 3]
    assert seeds(story, "independent")[:2] == [2643744188, 1284464803]


def test_another_story_seed_or_scene_id_is_another_noise(story: Story) -> None:
    (scene,) = story.scenes
    other_seed = story.model_copy(update={"seed": 6})
    other_scene = scene.model_copy(update={"id": "bay"})
    found = {
        video_seed(story, scene, None, "same"),
        video_seed(other_seed, scene, None, "same"),
        video_seed(story, other_scene, None, "same"),
    }
    assert len(found) == 3
