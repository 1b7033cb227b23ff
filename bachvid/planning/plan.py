"""What a render will do, before any weight loads: every error in a story or config shows here.

Pure: no torch. The driver renders what the plan says, and `plan_text.py` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass

from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.registry import load_facts
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.choices import DTYPE_BYTES
from bachvid.inputs.config import MethodConfig, RenderConfig
from bachvid.inputs.runs import read_steps, recorded_steps
from bachvid.inputs.story import IDENTITY_ID, Action, Scene, Story, video_seed
from bachvid.inputs.words import Range
from bachvid.layout.tokens import TokenLayout
from bachvid.planning.memory import PlannedMemory, plan_memory
from bachvid.planning.nodes import ClusterFacts
from bachvid.planning.placement import ExecutionPlan, plan_execution, plan_gangs
from bachvid.planning.resolve import resolve_config
from bachvid.prompts.compose import Prompt, PromptPart, compose_prompt
from bachvid.prompts.tokenizer import PromptTokenizer, TokenizedPrompt
from bachvid.prompts.vocabulary import check_negative, clean_story, mask_words, respell_story


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
    """Everything decided about a render. `config` is resolved: it has no None that a worker reads.

    `cache_bytes` are the keys and values of one scene. `execution` is None for a render in this
    process, which renders scenes one after another.
    """

    story: Story
    config: RenderConfig
    facts: ModelFacts
    layout: TokenLayout
    scenes: tuple[ScenePlan, ...]
    cache_bytes: int
    memory: PlannedMemory
    notes: tuple[str, ...]
    execution: ExecutionPlan | None = None

    @property
    def window(self) -> int | None:
        """Steps of one scene's keys and values that are kept at once; None: all of them."""
        is_window = self.execution is not None and self.execution.policy == "window"
        return self.config.cache.window if is_window else None

    @property
    def frame_steps(self) -> int:
        """Steps of one frame video, those of its pre-passes too."""
        method, steps = self.config.method, self.config.sampling.num_steps
        assert steps is not None
        assert method.mask_step is not None
        return steps + (len(read_steps(method)) - 1) * (method.mask_step + 1)

    @property
    def num_forwards(self) -> int:
        """Passes through the transformer for the whole story; one step may take two."""
        steps, scale = self.config.sampling.num_steps, self.config.sampling.guidance_scale
        assert steps is not None
        assert scale is not None
        passes = len(self.facts.passes) if scale > 1 else 1
        return passes * sum(steps + len(scene.frames) * self.frame_steps for scene in self.scenes)

    @property
    def seconds(self) -> float | None:
        """An estimate for 2 CPU cores, or None where nobody measured this model at this size."""
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
    """Decide what a render does. `source` is the story's name in messages, as its file.

    With `download` the tokenizer of a Hub model is fetched, so that its prompts are checked;
    without, they are where it is on this machine already, and else `tokens` are None.
    Raises ConfigError with one line per problem, also if `cluster` has too little for the
    render, and ModelSupportError for a model not supported.
    """
    facts = load_facts(config.model)
    resolved = resolve_config(config, facts)
    layout = facts.layout(resolved.video)
    identity, frame = plan_gangs(resolved, facts)
    notes = [*_model_notes(facts, resolved.method), *_noun_notes(story, resolved.method)]
    if facts.cleans_text:
        story = clean_story(story)
    if facts.vocabulary:
        story = respell_story(story, facts.vocabulary, source=source)
        check_negative(resolved.sampling.negative_prompt, facts.vocabulary)
    tokenizer: PromptTokenizer | None = None
    try:
        tokenizer = PromptTokenizer.load(facts, revision=resolved.model.revision, download=download)
    except ModelSupportError as error:
        if facts.folder or download:  # without it nothing will render
            raise
        notes.append(f"{error}; tokens are counted, and their limit checked, when rendering starts")
    scenes = _plan_scenes(story, resolved, tokenizer, source=source)
    cache_bytes = identity_cache_bytes(resolved, facts)
    execution = None
    if cluster is not None:
        execution = plan_execution(
            cluster,
            resolved,
            facts=facts,
            layout=layout,
            frames=[len(scene.frames) for scene in scenes],
            cache_bytes=cache_bytes,
            num_steps=len(recorded_steps(resolved.method)),
        )
    return RenderPlan(
        story=story,
        config=resolved,
        facts=facts,
        layout=layout,
        scenes=scenes,
        cache_bytes=cache_bytes,
        memory=plan_memory(resolved, facts, identity=identity, frame=frame),
        notes=tuple(notes),
        execution=execution,
    )


def identity_cache_bytes(resolved: RenderConfig, facts: ModelFacts) -> int:
    """Return the bytes of the keys and values that one identity video leaves to its scene."""
    method, dtype = resolved.method, resolved.model.dtype
    assert dtype is not None
    assert method.vital_layers is not None
    branches = 2 if method.branches == "both" else 1
    sites = len(recorded_steps(method)) * len(method.vital_layers) * branches
    shard = 2 * facts.layout(resolved.video).video_tokens * facts.num_heads * facts.head_dim
    return sites * shard * DTYPE_BYTES[dtype]


def _plan_scenes(
    story: Story, resolved: RenderConfig, tokenizer: PromptTokenizer | None, *, source: str
) -> tuple[ScenePlan, ...]:
    problems: list[str] = []
    noise = resolved.sampling.noise
    assert noise

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
        words: dict[PromptPart, tuple[Range, ...]],
    ) -> VideoPlan:
        text = action.text if action else scene.identity
        prompt = compose_prompt(scene.background, scene.character, text, words=words)
        return VideoPlan(
            id=action.id if action else IDENTITY_ID,
            action=action,
            prompt=prompt,
            tokens=tokenize(prompt, path),
            seed=video_seed(story, scene, action, noise),
        )

    scenes = []
    for number, scene in enumerate(story.scenes):
        where = f"{source}: scenes[{number}]"
        words: dict[PromptPart, tuple[Range, ...]] = {}
        try:
            words = mask_words(scene, resolved.method)
        except ConfigError as error:
            problems += [f"{where}.{line}" for line in str(error).splitlines()]
        identity = plan_video(scene, None, f"{where}.identity", words)
        frames = [
            plan_video(scene, action, f"{where}.actions[{index}].text", words)
            for index, action in enumerate(scene.actions)
        ]
        scenes.append(ScenePlan(scene, identity, tuple(frames)))
    tokenize(Prompt(resolved.sampling.negative_prompt), "sampling.negative_prompt")
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(scenes)


def _noun_notes(story: Story, method: MethodConfig) -> list[str]:
    given = any(scene.nouns.background or scene.nouns.character for scene in story.scenes)
    if method.name == "none" or not given or method.mask_words == "nouns":
        return []
    return [
        "the story's nouns are not used: method.mask_words is all, so masks come of whole parts"
    ]


def _model_notes(facts: ModelFacts, method: MethodConfig) -> list[str]:
    notes = []
    if method.name == "bachvid" and not facts.has_rope:
        notes.append(
            f"{facts.name} has no rotary positions: keys of the identity character keep the place "
            f"where they were recorded, so a character that moves is held less well"
        )
    return notes
