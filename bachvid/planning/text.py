"""A plan as the text that `bachvid plan` prints, and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from pydantic import JsonValue

from bachvid.inputs.choices import Offload
from bachvid.layout.gangs import Gang
from bachvid.planning.memory import PlannedMemory, RankMemory
from bachvid.planning.placement import ExecutionPlan
from bachvid.planning.plan import RenderPlan, ScenePlan, VideoPlan
from bachvid.prompts.compose import Segment
from bachvid.units import format_bytes, pluralize

OFFLOADS: tuple[Offload, ...] = ("none", "model")


def plan_text(plan: RenderPlan) -> str:
    """Return the plan as `bachvid plan` prints it."""
    config, layout = plan.config, plan.layout
    sampling, video = config.sampling, config.video
    grid = " x ".join(map(str, layout.grid))
    num_scenes, num_videos = len(plan.scenes), sum(len(scene.videos) for scene in plan.scenes)
    scenes = "1 scene" if num_scenes == 1 else f"{num_scenes} scenes"
    lines = [f'"{plan.story.title}": {scenes}, {num_videos} videos']
    for scene in plan.scenes:
        lines += ["", f"scene {scene.scene.id}"]
        if any(words := _mask_words(scene).values()):
            lines.append(f"  masks by {' against '.join(map(', '.join, words))}")
        for item in scene.videos:
            lines += [f"  {item.id}: {item.prompt.text}", f"    {_video_facts(item, plan)}"]
    lines += [
        "",
        f"model     {plan.facts.name}, {config.model.dtype}, on {config.model.device}",
        f"video     {video.pixel_frames} frames of {video.height} x {video.width} pixels at "
        f"{config.output.fps} fps: {grid} = {layout.video_tokens} tokens",
        f"sampling  {sampling.num_steps} steps of {sampling.scheduler}, guidance "
        f"{sampling.guidance_scale:g}, noise {sampling.noise}",
        *(f"{label:<10}{text}" for label, text in plan.method_lines.items()),
        *_memory_lines(plan.memory, config.model.offload),
        f"cache     {format_bytes(plan.cache_bytes)} of keys and values for one scene",
        *(_execution_lines(plan.execution) if plan.execution else []),
        f"time      {_time_text(plan)}, {plan.num_forwards} passes through the transformer",
        f"config    {config.sha256[:12]}",
        *(f"note      {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def plan_json(plan: RenderPlan) -> dict[str, JsonValue]:
    """Return the plan as plain data, for `bachvid plan --json`."""
    return {
        "title": plan.story.title,
        "scenes": [
            {
                "id": scene.scene.id,
                "mask_words": {
                    segment: list(words) for segment, words in _mask_words(scene).items()
                },
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
        "config_hash": plan.config.sha256,
        "cache_bytes": plan.cache_bytes,
        "memory": {
            "identity": _memory_json(plan.memory.identity),
            "frame": _memory_json(plan.memory.frame),
        },
        "forwards": plan.num_forwards,
        "seconds": plan.seconds,
        "execution": asdict(plan.execution) if plan.execution else None,
        "notes": list(plan.notes),
    }


def _memory_lines(memory: PlannedMemory, offload: Offload) -> list[str]:
    if memory.identity == memory.frame:
        lines = [f"memory    {_memory_text(memory.frame, offload)}"]
    else:
        lines = [
            f"memory    rank of an identity video: {_memory_text(memory.identity, offload)}",
            f"memory    rank of a frame video: {_memory_text(memory.frame, offload)}",
        ]
    ranks = (memory.identity, memory.frame)
    most = {
        choice: max(max(phases) for rank in ranks if (phases := rank.phases(choice)))
        for choice in OFFLOADS
        if memory.frame.weights
    }
    if most:
        lines.append(
            f"offload   {offload}; model.offload=model holds only the component in use on the GPU: "
            f"at most {format_bytes(most['model'])}, and {format_bytes(most['none'])} without it"
        )
    return lines


def _memory_text(rank: RankMemory, offload: Offload) -> str:
    phases = rank.phases(offload)
    if phases is None or rank.weights is None:
        step = max(rank.forward, rank.matching)
        return (
            f"{format_bytes(step)} of a GPU for a step and {format_bytes(rank.decode)} to decode, "
            f"beside weights that are not here to be counted"
        )
    encoding, denoising, decoding = map(format_bytes, phases)
    return (
        f"at most {format_bytes(max(phases))} of a GPU: {encoding} to encode prompts (the text "
        f"encoder, {format_bytes(rank.weights.text_encoder)}, is freed then), {denoising} to "
        f"denoise (weights {format_bytes(rank.weights.transformer)}) and {decoding} to decode"
    )


def _memory_json(rank: RankMemory) -> dict[str, JsonValue]:
    phases = {offload: rank.phases(offload) for offload in OFFLOADS}
    shown: dict[str, JsonValue] = {
        offload: dict(each._asdict()) if each else None for offload, each in phases.items()
    }
    return {**asdict(rank), "phases": shown}


def _execution_lines(execution: ExecutionPlan) -> list[str]:
    unit = "wave" if execution.policy == "window" else "round"
    lines = [
        f"workers   {_workers_text(execution)}: {pluralize(execution.waves, unit)}",
        f"policy    {execution.policy}: {execution.why}",
    ]
    if execution.policy == "retain":
        lines.append(
            f"scenes    at most {execution.live_scenes} at a time with a cache on one node"
        )
    for node in execution.nodes:
        lines.append(
            f"node      {node.name}: {pluralize(node.workers, 'worker')}, at most "
            f"{format_bytes(node.cache_bytes)} of keys and values in a store of "
            f"{format_bytes(node.store_bytes)}"
        )
    degrees = ", ".join(
        f"{degree.ranks} (pads {degree.padding} tokens)" if degree.padding else str(degree.ranks)
        for degree in execution.degrees
    )
    lines.append(f"degrees   {degrees} ranks can share the tokens of a video")
    return lines


def _workers_text(execution: ExecutionPlan) -> str:
    each = pluralize(execution.cpus_per_worker, "CPU") + " and 1 GPU" * execution.gpus_per_worker
    identity, frame, number = execution.identity, execution.frame, execution.num_workers
    if execution.is_split:
        return (
            f"1 of {_gang_text(identity)} for identity videos, {number - 1} of {_gang_text(frame)} "
            f"for frame videos, on {execution.device}, {each} for each rank"
        )
    if frame.size > 1:
        return f"{number} of {_gang_text(frame)} on {execution.device}, {each} for each rank"
    return f"{number} on {execution.device}, {each} each"


def _gang_text(gang: Gang) -> str:
    halves = " in two halves, one for each branch" if gang.cfg == 2 else ""
    return pluralize(gang.size, "rank") + halves


def _mask_words(scene: ScenePlan) -> dict[Segment, tuple[str, ...]]:
    """Return the words whose attention makes the masks; empty if all words of a segment do."""
    segments: tuple[Segment, ...] = ("character", "background")
    return {segment: scene.identity.prompt.words(segment) for segment in segments}


def _video_facts(video: VideoPlan, plan: RenderPlan) -> str:
    seed = f"seed {video.seed}"
    if video.tokens is None:
        return f"{seed}, tokens not counted"
    spans = ", ".join(
        f"{segment} {_rows_text(rows)}" for segment, rows in video.tokens.rows.items()
    )
    return f"{seed}, {video.tokens.num_tokens} of {plan.facts.text_tokens} tokens: {spans}"


def _rows_text(rows: tuple[int, ...]) -> str:
    """Return rows as runs: 1, 4-6."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][-1] + 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _time_text(plan: RenderPlan) -> str:
    return "unknown" if plan.seconds is None else f"about {plan.seconds:.0f} s on 2 CPU cores"


def _video_json(video: VideoPlan) -> dict[str, JsonValue]:
    tokens = video.tokens
    spans: Mapping[Segment, tuple[int, ...]] = tokens.rows if tokens else {}
    return {
        "id": video.id,
        "prompt": video.prompt.text,
        "seed": video.seed,
        "tokens": tokens.num_tokens if tokens else None,
        "spans": {segment: list(rows) for segment, rows in spans.items()},
    }
