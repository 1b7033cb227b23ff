"""What a rank of a gang renders in the tests."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from gangs import name_of
from numpy.typing import NDArray

from bachvid.attention.control import AttentionControl
from bachvid.attention.groups import SequenceGroup
from bachvid.engine.results import PreviewFrames, RenderedVideo, RunStep
from bachvid.engine.sampling import denoise
from bachvid.engine.videos import VideoJob, render_video
from bachvid.engine.worker import ModelWorker
from bachvid.inputs.story import Story
from bachvid.kv.cache import IdentityManifest, SceneCache
from bachvid.kv.packing import PackedStep
from bachvid.kv.pulling import PulledPieces
from bachvid.layout.gangs import Gang, overlapping_ranks
from bachvid.methods.base import Run
from bachvid.planning.config import RenderConfig
from bachvid.planning.plan import RenderPlan, render_plan

STORY = Story.model_validate(
    {
        "title": "One scene",
        "seed": 1,
        "scenes": [
            {
                "id": "forest",
                "background": "a snowy forest",
                "character": "a girl with a yellow coat",
                "actions": ["jumps"],
            }
        ],
    }
)

Blocks = dict[int, PackedStep]  # of one rank, by step


@dataclass(frozen=True)
class Written:
    """What a gang has recorded: the blocks of each rank, and the manifest."""

    gang: Gang
    blocks: tuple[Blocks, ...]
    manifest: IdentityManifest


@dataclass(frozen=True)
class Shown:
    """What a rank saw of one model. Only rank 0 has videos and previews."""

    plain: NDArray[np.float32]  # latents
    identity: RenderedVideo | None
    manifest: IdentityManifest
    frames: Mapping[str, RenderedVideo | None]  # by who wrote the keys and values
    num_previews: int
    provenance: Mapping[str, str]


Job = tuple[Sequence[str], Path, Sequence[str]]  # overrides, folder and reads of `show`


def show_all(group: SequenceGroup, gang: Gang, jobs: Sequence[Job]) -> list[Shown]:
    return [show(group, gang, *job) for job in jobs]


def show(
    group: SequenceGroup,
    gang: Gang,
    overrides: Sequence[str],
    folder: Path,
    reads: Sequence[str],
) -> Shown:
    """Render a video plainly, an identity video, and frame videos from what gangs recorded.

    What this gang records is left in `folder` under its name; it `reads` from there, also itself.
    """
    plan = render_plan(STORY, RenderConfig.from_yaml(None, list(overrides)))
    worker = ModelWorker(plan.config, plan.facts, group)
    scene = plan.scenes[0]
    worker.encode([video.prompt for video in scene.videos])
    plain = plain_latents(worker, plan)

    packer, blocks = worker.new_packer(), Blocks()
    steps = render_video(
        worker,
        VideoJob("identity", "forest", scene.identity, plan.runs("identity"), sink=packer),
    )
    previews = 0
    while True:
        try:
            item = next(steps)
        except StopIteration as end:
            identity = end.value
            break
        if isinstance(item, IdentityManifest):
            manifest = item
        elif isinstance(item, PreviewFrames):
            previews += 1
        elif isinstance(item, RunStep) and (packed := packer.take(item.step)):
            blocks[item.step] = pickle.loads(pickle.dumps(packed))
    write(folder / name_of(gang), gang, group, blocks, manifest)
    frames = {writer: frame(worker, plan, folder / writer) for writer in reads}
    return Shown(plain, identity, manifest, frames, previews, worker.provenance)


def plain_latents(worker: ModelWorker, plan: RenderPlan) -> NDArray[np.float32]:
    video = plan.scenes[0].identity
    for done in denoise(
        worker.model,
        worker.new_context(),
        Run(tuple(range(plan.config.sampling.num_steps))),
        prompt_embeds=worker.embeds[video.prompt.text],
        negative_embeds=worker.embeds[""],
        noise=worker.model.initial_noise(video.seed, plan.config.video),
        noise_seed=video.seed,
        sampling=plan.config.sampling,
        control=AttentionControl(),
    ):
        latents = done.latents
    return latents.numpy()


def write(
    path: Path, gang: Gang, group: SequenceGroup, blocks: Blocks, manifest: IdentityManifest
) -> None:
    """Let every rank write its blocks, and wait until all of them have."""
    rank = group.cfg_rank * group.size + group.rank
    path.with_name(f"{path.name}.{rank}").write_bytes(
        pickle.dumps(Written(gang, (blocks,), manifest))
    )
    if gang.size > 1:
        dist.barrier()


def read(path: Path) -> Written:
    ranks: list[Written] = [
        pickle.loads(file.read_bytes()) for file in sorted(path.parent.glob(f"{path.name}.*"))
    ]
    assert len(ranks) == ranks[0].gang.size
    return replace(ranks[0], blocks=tuple(rank.blocks[0] for rank in ranks))


def frame(worker: ModelWorker, plan: RenderPlan, path: Path) -> RenderedVideo | None:
    """Render a frame video from the blocks that this rank needs, as `overlapping` names them."""
    written, facts = read(path), worker.facts
    manifest, runs = written.manifest, plan.frame_runs
    writers = written.gang.shares(facts.num_heads)
    needed = overlapping_ranks(worker.share, writers, manifest.records.branches)
    reading = [run.sources for run in runs if run.reads]
    source = PulledPieces(
        lambda run, place: [written.blocks[rank][reading[run][place]] for rank in needed],
        share=worker.share,
        records=manifest.records,
        passes=facts.passes,
        config_hash=manifest.config_hash,
    )
    scene = SceneCache(manifest, source)
    job = VideoJob("frame", "forest", plan.scenes[0].frames[0], runs, open_scene=lambda: scene)
    steps = render_video(worker, job)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        rendered: RenderedVideo | None = end.value
        return rendered
    finally:
        source.close()
