"""What a render will do, before any weight loads: every error in a story or config shows here.

Pure: no torch. The driver renders what the plan says, and `bachvid plan` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bachvid.config import (
    DTYPE_BYTES,
    MethodConfig,
    RenderConfig,
    VideoConfig,
    config_hash,
    recorded_steps,
    resolve_config,
)
from bachvid.errors import ConfigError, ModelSupportError
from bachvid.facts import ModelFacts, Vocabulary, load_facts
from bachvid.prompts import (
    PARTS,
    Prompt,
    PromptPart,
    PromptTokenizer,
    TokenizedPrompt,
    compose_prompt,
    vocabulary_phrase,
)
from bachvid.story import IDENTITY_ID, Action, Scene, Story, video_seed
from bachvid.tokens import TokenLayout

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


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
    """Everything decided about a render. `config` is resolved: it has no None to fill.

    `cache_bytes` are the keys and values of one scene; scenes are rendered one after another.
    `seconds` is an estimate for 2 CPU cores, or None where nobody measured.
    """

    story: Story
    config: RenderConfig
    facts: ModelFacts
    layout: TokenLayout
    scenes: tuple[ScenePlan, ...]
    cache_bytes: int
    num_forwards: int
    seconds: float | None
    notes: tuple[str, ...]


def render_plan(
    story: Story, config: RenderConfig, *, source: str = "story", download: bool = False
) -> RenderPlan:
    """Decide what a render does. `source` is the story's name in messages, as its file.

    With `download` the tokenizer of a Hub model is fetched, so that its prompts are checked;
    without, they are where it is on this machine already, and else `tokens` are None.
    Raises ConfigError with one line per problem, ModelSupportError for a model not supported.
    """
    facts = load_facts(config.model)
    resolved = resolve_config(config, facts)
    layout = plan_layout(resolved.video, facts)
    notes = _model_notes(facts, resolved.method)
    if facts.vocabulary:
        story = _in_vocabulary(story, facts.vocabulary, source=source)
        _check_negative(resolved.sampling.negative_prompt, facts.vocabulary)
    tokenizer: PromptTokenizer | None = None
    try:
        tokenizer = PromptTokenizer.load(facts, revision=resolved.model.revision, download=download)
    except ModelSupportError as error:
        if facts.folder or download:  # without it nothing will render
            raise
        notes.append(f"{error}; tokens are counted, and their limit checked, when rendering starts")
    scenes = _plan_scenes(story, resolved, tokenizer, source=source)
    forwards = sum(_count_forwards(scene, resolved) for scene in scenes)
    return RenderPlan(
        story=story,
        config=resolved,
        facts=facts,
        layout=layout,
        scenes=scenes,
        cache_bytes=identity_cache_bytes(resolved, facts),
        num_forwards=forwards,
        seconds=_estimate_seconds(resolved.video, facts, forwards),
        notes=tuple(notes),
    )


def plan_layout(video: VideoConfig, facts: ModelFacts) -> TokenLayout:
    """Give the token layout of a resolved video config. Raises ConfigError for illegal sizes."""
    assert video.pixel_frames and video.height and video.width
    return TokenLayout(facts.text_tokens, *facts.grid(video.pixel_frames, video.height, video.width))


def identity_cache_bytes(resolved: RenderConfig, facts: ModelFacts) -> int:
    """Give the bytes of the keys and values that one identity video leaves to its scene."""
    method, dtype = resolved.method, resolved.model.dtype
    assert dtype and method.vital_layers
    branches = 2 if method.branches == "both" else 1
    sites = len(recorded_steps(method)) * len(method.vital_layers) * branches
    shard = 2 * plan_layout(resolved.video, facts).video_tokens * facts.num_heads * facts.head_dim
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

    def plan_video(scene: Scene, action: Action | None, path: str) -> VideoPlan:
        text = action.text if action else scene.identity
        prompt = compose_prompt(scene.background, scene.character, text)
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
        identity = plan_video(scene, None, f"{where}.identity")
        frames = [
            plan_video(scene, action, f"{where}.actions[{index}].text")
            for index, action in enumerate(scene.actions)
        ]
        scenes.append(ScenePlan(scene, identity, tuple(frames)))
    tokenize(Prompt(resolved.sampling.negative_prompt), "sampling.negative_prompt")
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(scenes)


def _in_vocabulary(story: Story, vocabulary: Vocabulary, *, source: str) -> Story:
    """Give the story in the vocabulary's spelling. Raises ConfigError for other words."""
    problems: list[str] = []

    def phrase(part: PromptPart, words: str, path: str) -> str:
        try:
            return vocabulary_phrase(part, words, vocabulary)
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


def _check_negative(words: str, vocabulary: Vocabulary) -> None:
    known = {phrase for part in PARTS for phrase in getattr(vocabulary, part)}
    if words and words not in known:
        raise ConfigError(
            f"sampling.negative_prompt: is {words!r}: this model knows only the phrases of its "
            f"vocabulary; leave it empty, or use one of them"
        )


def _model_notes(facts: ModelFacts, method: MethodConfig) -> list[str]:
    notes = []
    if method.name == "bachvid" and not facts.has_rope:
        notes.append(
            f"{facts.name} has no rotary positions: keys of the identity character keep the place "
            f"where they were recorded, so a character that moves is held less well"
        )
    return notes


def _count_forwards(scene: ScenePlan, resolved: RenderConfig) -> int:
    method, steps = resolved.method, resolved.sampling.num_steps
    assert steps is not None
    assert method.mask_step is not None
    pre_pass = method.mask_step + 1 if method.name == "bachvid" else 0
    return len(scene.videos) * steps + len(scene.frames) * pre_pass


def _estimate_seconds(video: VideoConfig, facts: ModelFacts, forwards: int) -> float | None:
    measured = facts.defaults.seconds_per_forward
    default = (facts.defaults.pixel_frames, facts.defaults.height, facts.defaults.width)
    if measured is None or (video.pixel_frames, video.height, video.width) != default:
        return None
    return measured * forwards


# --- for people and programs ----------------------------------------------------------------------


def plan_text(plan: RenderPlan) -> str:
    """Give the plan as `bachvid plan` prints it."""
    config, layout = plan.config, plan.layout
    method, sampling, video = config.method, config.sampling, config.video
    grid = " x ".join(map(str, layout.grid))
    lines = [
        f'"{plan.story.title}": {len(plan.scenes)} scenes, '
        f"{sum(len(scene.videos) for scene in plan.scenes)} videos"
    ]
    for scene in plan.scenes:
        lines += ["", f"scene {scene.scene.id}"]
        for item in scene.videos:
            lines += [f"  {item.id}: {item.prompt.text}", f"    {_video_facts(item, plan)}"]
    lines += [
        "",
        f"model     {plan.facts.name}, {config.model.dtype}, on {config.model.device}",
        f"video     {video.pixel_frames} frames of {video.height} x {video.width} pixels at "
        f"{config.output.fps} fps: {grid} = {layout.video_tokens} tokens",
        f"sampling  {sampling.num_steps} steps of {sampling.scheduler}, guidance "
        f"{sampling.guidance_scale:g}, noise {sampling.noise}",
        *_method_lines(method),
        f"cache     {format_bytes(plan.cache_bytes)} of keys and values, for one scene at a time",
        f"time      {_time_text(plan)}, {plan.num_forwards} passes through the transformer",
        f"config    {config_hash(config)[:12]}",
        *(f"note      {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def plan_json(plan: RenderPlan) -> dict[str, JsonValue]:
    """Give the plan as plain data, for `bachvid plan --json`."""
    return {
        "title": plan.story.title,
        "scenes": [
            {
                "id": scene.scene.id,
                "videos": [_video_json(video) for video in scene.videos],
            }
            for scene in plan.scenes
        ],
        "model": plan.facts.name,
        "layout": {
            "text_tokens": plan.layout.text_tokens,
            "grid": list(plan.layout.grid),
            "video_tokens": plan.layout.video_tokens,
        },
        "config": plan.config.model_dump(mode="json"),
        "config_hash": config_hash(plan.config),
        "cache_bytes": plan.cache_bytes,
        "forwards": plan.num_forwards,
        "seconds": plan.seconds,
        "notes": list(plan.notes),
    }


def format_bytes(count: int) -> str:
    """Give a count of bytes in decimal units, as disks and memory are sold."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _method_lines(method: MethodConfig) -> list[str]:
    if method.name == "none":
        return ["method    none: every video on its own"]
    assert method.vital_layers and method.inject_steps
    first, last = method.inject_steps
    return [
        f"method    {method.name}, profile {method.profile}: {method.branches} branches, steps "
        f"{first} to {last - 1}, mask at step {method.mask_step}, in the pre-pass "
        f"{method.pre_pass_injection}",
        f"layers    {', '.join(map(str, method.vital_layers))}",
    ]


def _video_facts(video: VideoPlan, plan: RenderPlan) -> str:
    seed = f"seed {video.seed}"
    if video.tokens is None:
        return f"{seed}, tokens not counted"
    spans = ", ".join(f"{part} {_rows_text(rows)}" for part, rows in video.tokens.rows.items())
    return f"{seed}, {video.tokens.num_tokens} of {plan.layout.text_tokens} tokens: {spans}"


def _rows_text(rows: tuple[int, ...]) -> str:
    return str(rows[0]) if len(rows) == 1 else f"{rows[0]}-{rows[-1]}"


def _time_text(plan: RenderPlan) -> str:
    return "unknown" if plan.seconds is None else f"about {plan.seconds:.0f} s on 2 CPU cores"


def _video_json(video: VideoPlan) -> dict[str, JsonValue]:
    tokens = video.tokens
    spans: Mapping[PromptPart, tuple[int, ...]] = tokens.rows if tokens else {}
    return {
        "id": video.id,
        "prompt": video.prompt.text,
        "seed": video.seed,
        "tokens": tokens.num_tokens if tokens else None,
        "spans": {part: list(rows) for part, rows in spans.items()},
    }
