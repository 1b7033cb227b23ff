"""What a full-size video costs with the method, as multiples of a vanilla one in the same run.

    python benchmarks/full_size.py --model THUDM/CogVideoX-5b        # on a GPU
    python benchmarks/full_size.py --size tiny                       # anywhere: that it runs

No weights are needed: the transformer is made on the device with random ones, and prompts are
random embeddings. Masks of random weights mean nothing, so the real code for masks and matches
runs, and then its answer is replaced by boxes: a share of the tokens, left in the frame video,
right in the identity video, all of them matched. A video is cut to a few denoising steps; one of
50 steps is put together from the seconds of its kinds of steps. One JSON line per measurement
goes to --results.

Where the identity's keys and values lie: `memory`, as in a render on one machine; `pulled`, packed
and staged by a thread in pinned memory, as on a cluster; `resident`, on the device, which is the
floor: injecting without copies.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import click
import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from bachvid.attention.groups import ALONE, SequenceGroup
from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.registry import published_models
from bachvid.engine.results import Frames, RunStep
from bachvid.engine.videos import VideoJob, render_video
from bachvid.engine.worker import ModelWorker
from bachvid.inputs.sections import ModelConfig
from bachvid.kv.cache import (
    IdentityManifest,
    MemoryPieces,
    PieceSink,
    SceneCache,
    Shard,
)
from bachvid.kv.packing import PackedStep
from bachvid.kv.pulling import PulledPieces
from bachvid.layout.gangs import Gang
from bachvid.layout.records import AttentionSite
from bachvid.layout.tokens import TokenLayout
from bachvid.methods.bachvid import PROFILES
from bachvid.methods.base import Role
from bachvid.methods.controls import injecting, observing
from bachvid.methods.ops.masks import ForegroundMask, extract_foreground_mask
from bachvid.methods.ops.matching import TokenMatch
from bachvid.models.base import VideoModel
from bachvid.models.cogvideox import CogVideoXModel
from bachvid.models.registry import ADAPTERS
from bachvid.models.wan import WanModel
from bachvid.planning.config import RenderConfig, ResolvedConfig
from bachvid.planning.memory import rank_memory
from bachvid.planning.plan import VideoPlan
from bachvid.planning.resolve import build_method, resolve_config
from bachvid.prompts.compose import Prompt, Segment
from bachvid.prompts.tokenizer import TokenizedPrompt

Place = Literal["memory", "resident", "pulled"]  # in this order: the last one empties the first

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_GPU = DEVICE.type == "cuda"
_GIB = 2**30
_WHOLE = 50  # steps of the video that is put together
_MASK_STEP = 1  # of the few steps that are run
_TINY = ("video.pixel_frames=9", "video.height=64", "video.width=96")


# --- what stands in for weights, prompts and masks ---------------------------------------------


def tiny(facts: ModelFacts) -> ModelFacts:
    """Return the same family at a size for CPUs."""
    head_dim = 64 if facts.family == "cogvideox" else 24
    layers = dict.fromkeys(("vital_layers", "mask_layers", "match_layers"), (1, 2))
    attention = facts.attention.model_copy(update=layers)
    return replace(
        facts, num_layers=4, num_heads=2, head_dim=head_dim, ffn_dim=64, attention=attention
    )


def random_model(config: ModelConfig, facts: ModelFacts, group: SequenceGroup) -> VideoModel:
    """Return the model of `facts` with random weights, made on the device; it has no decoder."""
    torch.manual_seed(0)
    dtype = getattr(torch, str(config.dtype))
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    transformer: nn.Module
    try:
        with torch.device(DEVICE):
            size = {
                "num_layers": facts.num_layers,
                "num_attention_heads": facts.num_heads,
                "attention_head_dim": facts.head_dim,
            }
            if facts.family == "cogvideox":
                transformer = CogVideoXTransformer3DModel(
                    use_rotary_positional_embeddings=facts.has_rope, **size
                )
            else:
                transformer = WanTransformer3DModel(ffn_dim=facts.ffn_dim, **size)
    finally:
        torch.set_default_dtype(default)
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, parameter in transformer.named_parameters():  # as diffusers loads them
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    adapter, scheduler = (
        (
            CogVideoXModel,
            CogVideoXDDIMScheduler(
                prediction_type="v_prediction",
                timestep_spacing="trailing",
                rescale_betas_zero_snr=True,
                clip_sample=False,
                snr_shift_scale=1.0,
            ),
        )
        if facts.family == "cogvideox"
        else (
            WanModel,
            UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    )

    def no_text_encoder() -> Any:
        raise AssertionError("prompts are random embeddings")

    return adapter(
        facts,
        transformer=transformer.eval().requires_grad_(False),
        vae=nn.Identity(),
        load_text_encoder=no_text_encoder,
        scheduler_config=dict(scheduler.config),
        device=DEVICE,
        group=group,
    )


_models: dict[str, VideoModel] = {}


def shared_model(config: ModelConfig, facts: ModelFacts, group: SequenceGroup) -> VideoModel:
    """Return the model that all workers share; the first call makes it."""
    if facts.name not in _models:
        _models[facts.name] = random_model(config, facts, group)
    return _models[facts.name]


class BenchWorker(ModelWorker):
    """A worker whose prompts are random embeddings, and whose videos are not decoded."""

    def __init__(self, config: ResolvedConfig, facts: ModelFacts) -> None:
        super().__init__(config, facts)
        torch.manual_seed(1)
        shape = (1, facts.text_tokens, facts.text_dim)
        for text in ("identity", "frame", config.sampling.negative_prompt):
            self.embeds[text] = 0.2 * torch.randn(shape).to(DEVICE, self.model.dtype)

    def decode(self, latents: Tensor) -> Frames | None:
        """Return one black pixel."""
        return np.zeros((1, 1, 1, 3), np.uint8)


def video_plan(role: Role, facts: ModelFacts) -> VideoPlan:
    """Return a video whose prompt has a background, a character and an action."""
    rows: dict[Segment, tuple[int, ...]] = {
        "background": tuple(range(6)),
        "character": tuple(range(7, 13)),
        "action": tuple(range(14, 17)),
    }
    ids = (5,) * 18 + (1,) + (0,) * (facts.text_tokens - 19)
    return VideoPlan(role, None, Prompt(role), TokenizedPrompt(ids, rows, 19), seed=7)


class Boxes:
    """Replaces masks and matches by boxes, and keeps what the real code had found."""

    def __init__(self, foreground: float) -> None:
        self.foreground = foreground
        self.role: Role = "frame"
        self.found: dict[str, float] = {}

    def mask(self, layout: TokenLayout) -> Tensor:
        """Return the box of the video that is being rendered: bool [N]."""
        _, height, width = layout.grid
        columns = max(1, min(width, round(width * self.foreground * 2)))
        mask = torch.zeros(layout.grid, dtype=torch.bool)
        mask[:, height // 4 : height - height // 4, :columns] = True
        return (mask if self.role == "frame" else mask.flip(2)).flatten()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in for the real answers, which are computed first."""
        extract, match = extract_foreground_mask, injecting.FrameInjector._match

        def boxed(masses: Sequence[Tensor], layout: TokenLayout, **kwargs: Any) -> ForegroundMask:
            real = extract(masses, layout, **kwargs)
            natural = round(float(real.mask_N.float().mean()), 3)
            self.found[f"natural foreground, {self.role}"] = natural
            return replace(real, mask_N=self.mask(layout).to(real.mask_N.device), recovery=None)

        def matched(injector: injecting.FrameInjector, frame_mask_N: Tensor) -> TokenMatch:
            index_Q, score_Q = match(injector, frame_mask_N)
            identity_N = injector._scene.manifest.foreground_mask_N
            assert identity_N is not None
            rows_P = identity_N.nonzero().flatten().to(index_Q.device)
            order_Q = torch.arange(len(index_Q), device=index_Q.device)
            return TokenMatch(rows_P[order_Q % len(rows_P)], torch.ones_like(score_Q))

        with (
            mock.patch.object(observing, "extract_foreground_mask", boxed),
            mock.patch.object(injecting.FrameInjector, "_match", matched),
        ):
            yield


# --- where keys and values lie -----------------------------------------------------------------


class ResidentPieces:
    """One shard that lies on the device, for every site."""

    def __init__(self, shard: Shard) -> None:
        self._pieces = {kind: piece.to(DEVICE) for kind, piece in shard.pieces.items()}

    def begin(self, steps: Sequence[int]) -> None:
        """Do nothing."""

    def get(self, site: AttentionSite) -> Shard:
        """Return the shard."""
        return Shard(site, self._pieces)


# --- measuring ---------------------------------------------------------------------------------


def sync() -> None:
    """Wait for the device."""
    if IS_GPU:
        torch.cuda.synchronize()


@dataclass
class Measured:
    """Seconds of every step of a video, by run; GPU and host bytes at most."""

    seconds: dict[tuple[int, int], float] = field(default_factory=dict)
    manifest: IdentityManifest | None = None
    peak: int = 0

    def of(self, run: int, steps: Sequence[int]) -> float:
        """Return the median of some steps."""
        return statistics.median(self.seconds[run, step] for step in steps)


class Bench:
    """Renders videos of a few steps, and writes what they cost."""

    def __init__(
        self, facts: ModelFacts, overrides: Sequence[str], boxes: Boxes, write: Callable[..., None]
    ) -> None:
        self.facts, self.overrides, self.boxes, self.write = facts, tuple(overrides), boxes, write

    def worker(self, *overrides: str) -> BenchWorker:
        """Return a worker of a config; the weights are the same, and there once."""
        config = RenderConfig.from_yaml(None, (*self.overrides, *overrides))
        return BenchWorker(resolve_config(config, self.facts), self.facts)

    def render(
        self,
        worker: BenchWorker,
        role: Role,
        *,
        sink: PieceSink | None = None,
        scene: SceneCache | None = None,
        after: Callable[[RunStep], None] = lambda said: None,
    ) -> Measured:
        """Render a video and time its steps, each up to the moment when the device has done it."""
        self.boxes.role = role
        found = Measured()
        opened = None if scene is None else lambda: scene
        video = video_plan(role, self.facts)
        job = VideoJob(role, "scene", video, worker.method.runs(role), sink, opened)
        if IS_GPU:
            torch.cuda.reset_peak_memory_stats()
        sync()
        start = time.perf_counter()
        for said in render_video(worker, job):
            if isinstance(said, IdentityManifest):
                found.manifest = said
            if isinstance(said, RunStep):
                sync()
                now = time.perf_counter()
                found.seconds[said.run, said.step] = round(now - start, 4)
                after(said)
                sync()
                start = time.perf_counter()
        if IS_GPU:
            found.peak = torch.cuda.max_memory_allocated()
        return found

    def report(self, kind: str, found: Measured, **more: object) -> None:
        """Write what a video cost."""
        self.write(
            kind,
            seconds={f"run {run}, step {step}": s for (run, step), s in found.seconds.items()},
            peak_gib=round(found.peak / _GIB, 2),
            host_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
            **more,
        )

    def vanilla(self, steps: int) -> float:
        """Return the seconds of a plain step."""
        worker = self.worker("method.name=none", "method.mask_step=0")  # no plain step has it
        self.report("warm-up", self.render(worker, "frame"))
        found = self.render(worker, "frame")
        self.report("vanilla", found)
        return found.of(0, range(1, steps))

    def profile(self, profile: str, plain: float, steps: int) -> None:
        """Measure a profile with the keys and values at each place."""
        injected = steps if profile == "fast" else max(1, (steps + 1) // 2)
        worker = self.worker(
            "method.name=bachvid",
            f"method.profile={profile}",
            f"method.mask_step={_MASK_STEP}",
            f"method.inject_steps=[0, {injected}]",
        )
        config, method = worker.config, worker.method
        memory = rank_memory(config, self.facts, method, Gang(), renders_frames=True)
        planned = memory.phases("none")
        weights = memory.weights.transformer if memory.weights else 0
        self.write(
            "plan",
            profile=profile,
            tokens=worker.layout.joint_tokens,
            vital_layers=len(method.records.layers),
            planned_denoising_gib=round((weights + max(memory.forward, memory.matching)) / _GIB, 2),
            planned_decoding_gib=None if planned is None else round(planned.decoding / _GIB, 2),
        )
        kept = MemoryPieces()
        identity = self.render(worker, "identity", sink=kept)
        assert identity.manifest is not None
        recorded = len(method.records.steps)
        self.report(
            "identity",
            identity,
            profile=profile,
            recorded_over_plain=round(identity.of(0, range(1, injected)) / plain, 3),
            gib_a_step=round(kept.nbytes / recorded / _GIB, 3),
        )
        for place in get_args(Place):
            with self._opened(place, worker, identity.manifest, kept) as scene:
                frame = self.render(worker, "frame", scene=scene)
            main = frame.of(len(method.runs("frame")) - 1, range(1, injected))
            waited = scene.source.wait_seconds if isinstance(scene.source, PulledPieces) else 0.0
            seen = {**self.boxes.found, "waited_s": round(waited, 4)}
            self.report("frame", frame, profile=profile, place=place, **seen)
            self.write(
                "summary",
                profile=profile,
                place=place,
                injected_over_plain=round(main / plain, 3),
                video_of_50_steps_over_vanilla=round(
                    self._whole(profile, frame, main, plain) / (_WHOLE * plain), 3
                ),
                peak_gib=round(frame.peak / _GIB, 2),
            )

    @contextmanager
    def _opened(
        self, place: Place, worker: BenchWorker, manifest: IdentityManifest, kept: MemoryPieces
    ) -> Iterator[SceneCache]:
        """Return a scene whose pieces lie at `place`; `kept` has them in memory until `pulled`."""
        if place == "memory":
            yield SceneCache(manifest, kept)
        elif place == "resident":
            records = worker.method.records
            yield SceneCache(manifest, ResidentPieces(kept.get(records.sites(records.steps[0])[0])))
        else:
            kept._shards.clear()  # its host memory is wanted now
            packs = self._packed(worker)
            reads = [run.sources for run in worker.method.runs("frame") if run.reads]
            source = PulledPieces(
                lambda run, number: [packs[reads[run][number]]],
                share=worker.share,
                records=manifest.records,
                passes=self.facts.passes,
                config_hash=manifest.config_hash,
            )
            try:
                yield SceneCache(manifest, source)
            finally:
                source.close()

    def _packed(self, worker: BenchWorker) -> Mapping[int, PackedStep]:
        """Render the identity once more, as a worker of a cluster does, and return its steps."""
        packs: dict[int, PackedStep] = {}
        packer = worker.new_packer()

        def take(said: RunStep) -> None:
            packed = packer.take(said.step)
            if packed is not None:  # its memory is used again for the next step
                packs[said.step] = replace(packed, payload=packed.payload.copy())

        self.report("identity, packed", self.render(worker, "identity", sink=packer, after=take))
        return packs

    def _whole(self, profile: str, frame: Measured, injected: float, plain: float) -> float:
        """Put together the seconds of a frame video of 50 steps, its pre-passes with it."""
        config = RenderConfig.from_yaml(
            None, (f"model.id={self.facts.name}", f"method.profile={profile}")
        )
        whole = resolve_config(config, self.facts)
        method = build_method(whole)
        runs = method.runs("frame")
        total = 0.0
        for number, run in enumerate(runs):
            reading = {read.step for read in run.reads}
            observed = number < len(runs) - 1
            for step in run.steps:
                cost = injected if step in reading else plain
                if observed and step == run.steps[-1]:
                    cost += max(0.0, frame.seconds[number, _MASK_STEP] - cost)
                total += cost
        # Matching is done when the main run begins, within its first step.
        return total + max(0.0, frame.seconds[len(runs) - 1, 0] - injected)


def decode(
    facts: ModelFacts, config: ResolvedConfig, write: Callable[..., None], tiny: bool
) -> None:
    """Time a decode, with random weights."""
    model = random_model(config.model, facts, ALONE)
    model.transformer = nn.Identity()
    vae: nn.Module
    with torch.device(DEVICE):
        if facts.family == "wan":
            vae = AutoencoderKLWan(**({"base_dim": 8} if tiny else {}))
        else:
            small: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2}
            vae = AutoencoderKLCogVideoX(**(small | {"layers_per_block": 1} if tiny else {}))
    wide = torch.float32 if facts.family == "wan" else model.dtype
    model.vae = vae.to(DEVICE, wide).eval().requires_grad_(False)
    latents = model.initial_noise(3, config.video)
    for turn in range(2):
        if IS_GPU:
            torch.cuda.reset_peak_memory_stats()
        sync()
        start = time.perf_counter()
        frames = model.decode(latents)
        sync()
        write(
            "decode",
            turn=turn,
            seconds=round(time.perf_counter() - start, 3),
            frames=list(frames.shape),
            peak_gib=round(torch.cuda.max_memory_allocated() / _GIB, 2) if IS_GPU else 0,
        )


@click.command()
@click.option("--model", "name", default="THUDM/CogVideoX-5b", show_default=True)
@click.option("--size", type=click.Choice(["real", "tiny"]), default="real", show_default=True)
@click.option("--steps", default=4, show_default=True)
@click.option("--foreground", default=0.2, show_default=True, help="Share of the tokens.")
@click.option("--results", type=click.Path(path_type=Path), help="JSON lines are appended.")
def main(
    name: str,
    size: str,
    steps: int,
    foreground: float,
    results: Path | None,
) -> None:
    """Measure one model."""
    began = time.monotonic()
    if size == "real" and not IS_GPU:
        raise click.UsageError("a full-size video needs a CUDA GPU; --size tiny runs anywhere")
    facts = published_models()[name]
    facts = tiny(facts) if size == "tiny" else facts

    def write(kind: str, **row: object) -> None:
        at = round(time.monotonic() - began, 1)
        line = json.dumps({"model": name, "size": size, "at_s": at, "kind": kind, **row})
        click.echo(line)
        if results:
            with results.open("a") as file:
                file.write(line + "\n")

    ADAPTERS[facts.family] = f"{__name__}:shared_model"
    overrides = [
        f"model.id={name}",
        f"model.dtype={'bfloat16' if IS_GPU else 'float32'}",
        f"model.device={DEVICE.type}",
        f"sampling.num_steps={steps}",
        *(_TINY if size == "tiny" else ()),
    ]
    boxes = Boxes(foreground)
    bench = Bench(facts, overrides, boxes, write)
    device = torch.cuda.get_device_name() if IS_GPU else "cpu"
    write("device", device=device, torch=str(torch.__version__))
    with boxes.installed():
        plain = bench.vanilla(steps)
        for profile in PROFILES:
            bench.profile(profile, plain, steps)
    config = bench.worker("method.name=none").config
    _models.clear()  # its memory is wanted now
    decode(facts, config, write, size == "tiny")


if __name__ == "__main__":
    main()
