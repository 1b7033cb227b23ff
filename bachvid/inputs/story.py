"""Stories: scenes of one background, one character and several actions.

Pure data, independent of any model.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bachvid.errors import ConfigError
from bachvid.inputs.strict_yaml import parse_mapping, quote, read_text, validate
from bachvid.inputs.words import find_words

IDENTITY_ID = "identity"  # of the identity video, and so no action's
NoisePolicy = Literal["same", "independent"]

# Stands for what is filled in from a text that is itself wrong, so that only the text is reported.
_UNKNOWN = "unknown"
_ID_RULE = "use small letters, digits, '-' and '_', first a letter or digit, at most 64 of them"
_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def _check_text(text: str) -> str:
    folded = " ".join(text.split())
    if not folded:
        raise ValueError("is empty; describe what should be visible")
    for character in folded:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise ValueError(f"has the control character U+{ord(character):04X}; remove it")
    return folded


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(_check_text(value))
    except ValueError:
        return False


def _check_id(name: str) -> str:
    if not _ID.fullmatch(name):
        raise ValueError(f"is {quote(name)}: {_ID_RULE}")
    return name


def _check_action_id(name: str) -> str:
    if name == IDENTITY_ID:
        raise ValueError(f"is {quote(name)}: that is the identity video's; choose another")
    return _check_id(name)


Text = Annotated[str, AfterValidator(_check_text)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Action(_Part):
    """What happens in one frame video. A `seed` of its own gives it a noise of its own."""

    id: Annotated[str, AfterValidator(_check_action_id)]
    text: Text
    seed: Seed | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_id(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"text": value}
        elif not isinstance(value, dict):
            raise ValueError(f"is {quote(value)}: must be text, or a mapping of id, text and seed")
        text = value.get("text")
        if "id" in value:
            return value
        if not _is_text(text):
            return {**value, "id": _UNKNOWN}
        slug = _slug(str(text))
        if not _ID.fullmatch(slug) or slug == IDENTITY_ID:
            raise ValueError(
                f"{quote(text)} makes no id for its files; write {{id: some-name, text: ...}}"
            )
        return {**value, "id": slug}


class Nouns(_Part):
    """The words that name the things of a scene. None: all of the segment but function words."""

    background: Annotated[tuple[Text, ...], Field(strict=False)] | None = None
    character: Annotated[tuple[Text, ...], Field(strict=False)] | None = None

    @field_validator("background", "character")
    @classmethod
    def _check_some(cls, words: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if words == ():
            raise ValueError("is empty; name a word, or leave the key out")
        return words


class Scene(_Part):
    """One background and one character in several actions.

    `identity` is the action of the identity video; by default that of the first action. `nouns`
    serve models whose masks come from nouns only (`method.mask_words`).
    """

    id: Annotated[str, AfterValidator(_check_id)]
    background: Text
    character: Text
    identity: Text
    actions: Annotated[tuple[Action, ...], Field(strict=False)]
    nouns: Nouns = Nouns()

    @model_validator(mode="before")
    @classmethod
    def _fill_identity(cls, value: object) -> object:
        if not isinstance(value, dict) or "identity" in value:
            return value
        actions = value.get("actions")
        first = actions[0] if isinstance(actions, list) and actions else None
        text = first.get("text") if isinstance(first, dict) else first
        return {**value, "identity": text if _is_text(text) else _UNKNOWN}

    @field_validator("actions")
    @classmethod
    def _check_actions(cls, actions: tuple[Action, ...]) -> tuple[Action, ...]:
        _check_ids("scene", "action", [action.id for action in actions])
        return actions

    @field_validator("nouns")
    @classmethod
    def _check_nouns(cls, nouns: Nouns, info: ValidationInfo) -> Nouns:
        for segment, words in (("background", nouns.background), ("character", nouns.character)):
            for word in words or ():
                # A text that is itself wrong is not there, and is reported.
                if segment in info.data and not find_words([word], info.data[segment]):
                    raise ValueError(
                        f"{segment} has {quote(word)}, which is no word of "
                        f"{quote(info.data[segment])}"
                    )
        return nouns


class Story(_Part):
    """A title, a seed and scenes: everything that a person decides about the videos."""

    title: Text
    seed: Seed = 0
    scenes: Annotated[tuple[Scene, ...], Field(strict=False)]

    @field_validator("scenes")
    @classmethod
    def _check_scenes(cls, scenes: tuple[Scene, ...]) -> tuple[Scene, ...]:
        _check_ids("story", "scene", [scene.id for scene in scenes])
        return scenes

    @classmethod
    def load(cls, path: Path) -> Story:
        """Read a story: YAML, or `.txt` lines of background#character#action.

        Raises ConfigError, with file and path, if it is not a story.
        """
        if path.suffix == ".txt":
            return cls.from_prompts(path)
        if path.suffix in (".yaml", ".yml"):
            return cls.from_yaml(path)
        raise ConfigError(f"{path}: a story is a .yaml file, or a .txt file of prompts")

    @classmethod
    def from_yaml(cls, path: Path) -> Story:
        """Read a YAML story. Raises ConfigError with one line per problem."""
        text = read_text(path)
        value = parse_mapping(text, source=str(path), keys=list(cls.model_fields))
        return validate(cls, value, source=lambda _: str(path))

    @classmethod
    def from_prompts(cls, path: Path) -> Story:
        """Read lines of `background#character#action`; a blank line starts the next scene.

        The title is the file's name, and the scenes are `scene-1`, `scene-2` and so on.
        Raises ConfigError with the line's number.
        """
        scenes: list[dict[str, object]] = []
        actions: list[str] = []
        of_scene: tuple[str, str] | None = None
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if not line.strip():
                of_scene = None
                continue
            background, character, action = _split_prompt(line, source=f"{path}:{number}")
            if of_scene is None:
                of_scene, actions = (background, character), []
                scenes.append(
                    {
                        "id": f"scene-{len(scenes) + 1}",
                        "background": background,
                        "character": character,
                        "actions": actions,
                    }
                )
            elif of_scene != (background, character):
                raise ConfigError(
                    f"{path}:{number}: background and character are not those of the line above; "
                    f"put a blank line before a new scene"
                )
            actions.append(action)
        title = " ".join(path.stem.replace("_", " ").replace("-", " ").split()) or path.name
        return validate(cls, {"title": title, "scenes": scenes}, source=lambda _: str(path))


def video_seed(story: Story, scene: Scene, action: Action | None, noise: NoisePolicy) -> int:
    """Return the noise seed of a video; `action` is None for the identity video.

    `same`: one seed for every video of a scene. `independent`: one for each video. Both depend
    on the story's seed and on ids only, so adding or moving scenes changes no other video. An
    action's own seed wins.
    """
    if action is not None and action.seed is not None:
        return action.seed
    path = [str(story.seed), scene.id]
    if noise == "independent":
        path.append(IDENTITY_ID if action is None else action.id)
    # 32 bits: short enough to be written back into a story as an action's seed.
    return int.from_bytes(hashlib.sha256("/".join(path).encode()).digest()[:4], "big")


def _slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:64].strip("-")


def _check_ids(whole: str, part: str, ids: list[str]) -> None:
    if not ids:
        raise ValueError(f"is empty; a {whole} needs at least one {part}")
    for index, name in enumerate(ids):
        if name in ids[:index]:
            raise ValueError(
                f"[{ids.index(name)}] and [{index}] have the same id {quote(name)}; "
                f"give each {part} its own id"
            )


def _split_prompt(line: str, *, source: str) -> tuple[str, str, str]:
    segments = [" ".join(segment.split()) for segment in line.split("#")]
    if len(segments) != 3:
        raise ConfigError(
            f"{source}: has {len(segments)} segments between '#': "
            f"a line is background#character#action"
        )
    for name, segment in zip(("background", "character", "action"), segments, strict=True):
        if not segment:
            raise ConfigError(f"{source}: the {name} is empty; describe what should be visible")
    return segments[0], segments[1], segments[2]
