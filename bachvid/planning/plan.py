"""The plan of a render, made before any weight loads. It finds every error in a story or config.

Pure: no torch. The driver renders what the plan says, and `bachvid.planning.text` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.registry import load_facts
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.choices import DTYPE_BYTES, MaskWords
from bachvid.inputs.story import IDENTITY_ID, Action, Scene, Story, video_seed
from bachvid.inputs.words import Range
from bachvid.layout.records import Records
from bachvid.layout.tokens import TokenLayout
from bachvid.methods.base import Method, Overlay, Run
from bachvid.methods.reading import ReadingOrder
from bachvid.planning.config import RenderConfig, ResolvedConfig
from bachvid.planning.memory import PlannedMemory, plan_memory
from bachvid.planning.nodes import ClusterFacts
from bachvid.planning.placement import ExecutionPlan, plan_execution, plan_gangs
from bachvid.planning.resolve import build_method, resolve_config
from bachvid.prompts.compose import Prompt, Segment, compose_prompt
from bachvid.prompts.tokenizer import PromptTokenizer, TokenizedPrompt
from bachvid.prompts.vocabulary import check_negative, clean_story, respell_story, words_of_masks


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """One video. `id` names its file; `action` is None for the identity video.

    `tokens` is None only where the model's tokenizer cannot be had before the model itself.
    """

    id: str
    action: Action | None
    prompt: Prompt
    tokens: TokenizedPrompt | None
    seed: int


@dataclass(frozen=True, slots=True)
class ScenePlan:
    """One scene: the identity video first, then a frame video for each action."""

    scene: Scene
    identity: VideoPlan
    frames: tuple[VideoPlan, ...]

    @property
    def videos(self) -> tuple[VideoPlan, ...]:
        """All videos, in the order of rendering."""
        return (self.identity, *self.frames)


@dataclass(frozen=True, slots=True)
class RenderPlan:
    """Everything decided about a render.

    `identity_runs` are the runs of every identity video: with a window it is run again for its
    readers. `cache_bytes` are the pieces that one scene records. `execution` is None for a render
    in this process, which renders scenes one after another.
    """

    story: Story
    config: ResolvedConfig
    facts: ModelFacts
    layout: TokenLayout
    scenes: tuple[ScenePlan, ...]
    reading: ReadingOrder
    frame_runs: tuple[Run, ...]
    cache_bytes: int
    memory: PlannedMemory
    method_lines: Mapping[str, str]
    shows: frozenset[Overlay]
    notes: tuple[str, ...]
    execution: ExecutionPlan | None = None

    @property
    def window(self) -> int | None:
        """Parts of a scene's pieces that are kept at once; None: all of them."""
        return self.config.cache.window if self.reading.is_window else None

    def runs(self, video: str) -> tuple[Run, ...]:
        """Return the runs of a video, by its id."""
        return self.reading.identity_runs if video == IDENTITY_ID else self.frame_runs

    def num_steps(self, video: str) -> int:
        """Count the steps of a video, over all its runs."""
        return sum(len(run.steps) for run in self.runs(video))

    @property
    def num_forwards(self) -> int:
        """Forwards of the transformer for the whole story; a step may take two."""
        passes = len(self.facts.passes) if self.config.sampling.guidance_scale > 1 else 1
        steps = sum(self.num_steps(video.id) for scene in self.scenes for video in scene.videos)
        return passes * steps

    @property
    def seconds(self) -> float | None:
        """An estimate for 2 CPU cores; None if this model was not measured at this size."""
        defaults, video = self.facts.defaults, self.config.video
        measured = (defaults.pixel_frames, defaults.height, defaults.width)
        if (video.pixel_frames, video.height, video.width) != measured:
            return None
        per_forward = defaults.seconds_per_forward
        return None if per_forward is None else per_forward * self.num_forwards


def render_plan(
    story: Story,
    config: RenderConfig,
    *,
    source: str = "story",
    download: bool = False,
    cluster: ClusterFacts | None = None,
) -> RenderPlan:
    """Plan a render. `source` names the story in messages: its file, for example.

    With `download` the tokenizer of a Hub model is fetched, so that prompts can be checked.
    Without it, prompts are checked if the tokenizer is on this machine, else `tokens` are None.
    Raises ConfigError with one line per problem, also if `cluster` is too small for the render,
    and ModelSupportError for a model that is not supported.
    """
    facts = load_facts(config.model)
    resolved = resolve_config(config, facts)
    method = build_method(resolved)
    layout = facts.layout(resolved.video)
    identity, frame = plan_gangs(resolved, facts)
    notes = [*method.notes(facts), *_noun_notes(story, method)]
    if facts.cleans_text:
        story = clean_story(story)
    if facts.vocabulary:
        story = respell_story(story, facts.vocabulary, source=source)
        check_negative(resolved.sampling.negative_prompt, facts.vocabulary)
    tokenizer = _load_tokenizer(facts, resolved, notes, download=download)
    scenes = _plan_scenes(story, resolved, method.mask_words, tokenizer, source=source)
    cache_bytes = records_bytes(method.records, resolved, facts)
    execution = None
    if cluster is not None:
        execution = plan_execution(
            cluster,
            resolved,
            facts=facts,
            layout=layout,
            method=method,
            frames=[len(scene.frames) for scene in scenes],
            cache_bytes=cache_bytes,
        )
    is_window = execution is not None and execution.policy == "window"
    return RenderPlan(
        story=story,
        config=resolved,
        facts=facts,
        layout=layout,
        scenes=scenes,
        reading=ReadingOrder(method, is_window=is_window),
        frame_runs=method.runs("frame"),
        cache_bytes=cache_bytes,
        memory=plan_memory(resolved, facts, method, identity=identity, frame=frame),
        method_lines=method.lines,
        shows=method.shows,
        notes=tuple(notes),
        execution=execution,
    )


def _load_tokenizer(
    facts: ModelFacts, config: ResolvedConfig, notes: list[str], *, download: bool
) -> PromptTokenizer | None:
    """Return the model's tokenizer; None and a note if it is downloaded when rendering starts."""
    try:
        return PromptTokenizer.load(facts, revision=config.model.revision, download=download)
    except ModelSupportError as error:
        if facts.folder or download:  # without it nothing will render
            raise
        notes.append(f"{error}; tokens are counted, and their limit checked, when rendering starts")
        return None


def records_bytes(records: Records, config: ResolvedConfig, facts: ModelFacts) -> int:
    """Return the bytes of what one identity video records, over all video rows."""
    piece = facts.layout(config.video).video_tokens * facts.num_heads * facts.head_dim
    return records.num_pieces * piece * DTYPE_BYTES[config.model.dtype]


def _plan_scenes(
    story: Story,
    config: ResolvedConfig,
    mask_words: MaskWords,
    tokenizer: PromptTokenizer | None,
    *,
    source: str,
) -> tuple[ScenePlan, ...]:
    problems: list[str] = []

    def tokenize(prompt: Prompt, path: str) -> TokenizedPrompt | None:
        try:
            return tokenizer.tokenize(prompt) if tokenizer else None
        except ConfigError as error:
            problems.append(f"{path}: {error}")
            return None

    def plan_video(
        scene: Scene,
        action: Action | None,
        path: str,
        words: dict[Segment, tuple[Range, ...]],
    ) -> VideoPlan:
        text = action.text if action else scene.identity
        prompt = compose_prompt(scene.background, scene.character, text, words=words)
        return VideoPlan(
            id=action.id if action else IDENTITY_ID,
            action=action,
            prompt=prompt,
            tokens=tokenize(prompt, path),
            seed=video_seed(story, scene, action, config.sampling.noise),
        )

    scenes = []
    for number, scene in enumerate(story.scenes):
        where = f"{source}: scenes[{number}]"
        words: dict[Segment, tuple[Range, ...]] = {}
        try:
            words = words_of_masks(scene, mask_words)
        except ConfigError as error:
            problems += [f"{where}.{line}" for line in str(error).splitlines()]
        identity = plan_video(scene, None, f"{where}.identity", words)
        frames = [
            plan_video(scene, action, f"{where}.actions[{index}].text", words)
            for index, action in enumerate(scene.actions)
        ]
        scenes.append(ScenePlan(scene, identity, tuple(frames)))
    tokenize(Prompt(config.sampling.negative_prompt), "sampling.negative_prompt")
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(scenes)


def _noun_notes(story: Story, method: Method[Any]) -> list[str]:
    given = any(scene.nouns.background or scene.nouns.character for scene in story.scenes)
    if not given or "mask" not in method.shows or method.mask_words == "nouns":
        return []
    return [
        "the story's nouns are not used: method.mask_words is all, so masks use every word of "
        "each segment"
    ]
