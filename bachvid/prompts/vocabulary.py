"""Adapts a story's text to a model, and picks the words its masks use. No torch."""

from __future__ import annotations

from bachvid.catalog.facts import Vocabulary
from bachvid.errors import ConfigError
from bachvid.inputs.choices import MaskWords
from bachvid.inputs.story import Scene, Story
from bachvid.inputs.words import Range, clean_text
from bachvid.prompts.compose import SEGMENTS, Segment, noun_ranges, vocabulary_phrase


def words_of_masks(scene: Scene, choice: MaskWords) -> dict[Segment, tuple[Range, ...]]:
    """Return the words that stand for each segment in masks; an empty dict means every word.

    Ranges are within the segment. Raises ConfigError, one line for each segment without such a
    word.
    """
    if choice == "all":
        return {}
    phrases: dict[Segment, tuple[str, tuple[str, ...] | None]] = {
        "background": (scene.background, scene.nouns.background),
        "character": (scene.character, scene.nouns.character),
    }
    found: dict[Segment, tuple[Range, ...]] = {}
    problems = []
    for segment, (phrase, nouns) in phrases.items():
        try:
            found[segment] = noun_ranges(phrase, nouns)
        except ConfigError as error:
            problems.append(f"{segment}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def clean_story(story: Story) -> Story:
    """Return the story with each segment cleaned as the stock pipeline cleans a whole prompt.

    By segment, so that spans stay exact.
    """

    def clean_all(words: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if words is None else tuple(map(clean_text, words))

    def clean(scene: Scene) -> Scene:
        nouns = scene.nouns
        update = {
            "background": clean_text(scene.background),
            "character": clean_text(scene.character),
            "identity": clean_text(scene.identity),
            "actions": tuple(
                action.model_copy(update={"text": clean_text(action.text)})
                for action in scene.actions
            ),
            "nouns": nouns.model_copy(
                update={
                    "background": clean_all(nouns.background),
                    "character": clean_all(nouns.character),
                }
            ),
        }
        return scene.model_copy(update=update)

    return story.model_copy(update={"scenes": tuple(map(clean, story.scenes))})


def respell_story(story: Story, vocabulary: Vocabulary, *, source: str) -> Story:
    """Return the story in the vocabulary's spelling. Raises ConfigError for other words."""
    problems: list[str] = []

    def phrase(segment: Segment, words: str, path: str) -> str:
        try:
            return vocabulary_phrase(segment, words, vocabulary)
        except ConfigError as error:
            problems.append(f"{source}: {path}: {error}")
            return words

    def respell(scene: Scene, where: str) -> Scene:
        given = len(problems)
        spelled = {
            "background": phrase("background", scene.background, f"{where}.background"),
            "character": phrase("character", scene.character, f"{where}.character"),
            "actions": tuple(
                action.model_copy(
                    update={"text": phrase("action", action.text, f"{where}.actions[{i}].text")}
                )
                for i, action in enumerate(scene.actions)
            ),
        }
        # By default it is the first action, of which enough was said then.
        if len(problems) == given or scene.identity != scene.actions[0].text:
            spelled["identity"] = phrase("action", scene.identity, f"{where}.identity")
        return scene.model_copy(update=spelled)

    scenes = tuple(respell(scene, f"scenes[{i}]") for i, scene in enumerate(story.scenes))
    if problems:
        raise ConfigError("\n".join(problems))
    return story.model_copy(update={"scenes": scenes})


def check_negative(words: str, vocabulary: Vocabulary) -> None:
    """Raise ConfigError for a negative prompt that the vocabulary does not have."""
    known = {phrase for segment in SEGMENTS for phrase in getattr(vocabulary, segment)}
    if words and words not in known:
        raise ConfigError(
            f"sampling.negative_prompt: is {words!r}: this model knows only the phrases of its "
            f"vocabulary; leave it empty, or use one of them"
        )
