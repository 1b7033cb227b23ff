"""Our loops against the stock pipelines, and against themselves: alone, interleaved, replayed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import (
    PROMPT,
    SEED,
    TINY_FAMILIES,
    VIDEO,
    TinyFamily,
    context_of,
    load_tiny,
    sampling_of,
)
from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionControl, Denoised, Guided, KVGroup
from bachvid.engine.sampling import Track, denoise, replay, source_track
from bachvid.inputs.choices import SchedulerName
from bachvid.kv.cache import MemoryPieces
from bachvid.layout.records import AttentionSite
from bachvid.methods.base import Observation, Run, RunControl, RunInputs
from bachvid.models.base import VideoModel
from bachvid.planning.config import RenderConfig
from bachvid.planning.resolve import build_method, resolve_config
from bachvid.prompts.compose import Prompt
from bachvid.prompts.tokenizer import PromptTokenizer


class Observer(AttentionControl):
    """A control that is there at every site and changes nothing."""

    def __init__(self) -> None:
        self.sites: list[AttentionSite] = []

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        self.sites.append(site)
        return qkv

    def extra(self, site: AttentionSite, qkv: QKV) -> list[KVGroup]:
        return []

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        return out_BSC


class Louder(AttentionControl):
    """A control that does change the video."""

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        return out_BSC * 2


class StepError(Exception):
    """What a control raises in these tests."""


def steps_of(
    model: VideoModel,
    *,
    context: RunContext | None = None,
    scheduler: SchedulerName | None = None,
    guidance_scale: float = 3.0,
    num_steps: int = 4,
    steps: Sequence[int] | None = None,
    noise_seed: int = SEED,
    control: AttentionControl | None = None,
) -> Iterator[Denoised]:
    embeds = model.encode_prompts([PROMPT, Prompt("", ())])
    return denoise(
        model,
        context or context_of(model),
        Run(tuple(range(num_steps) if steps is None else steps)),
        prompt_embeds=embeds[:1],
        negative_embeds=embeds[1:],
        noise=model.initial_noise(SEED, VIDEO),
        noise_seed=noise_seed,
        sampling=sampling_of(
            scheduler or model.facts.schedulers[0],
            num_steps=num_steps,
            guidance_scale=guidance_scale,
        ),
        control=control,
    )


def replayed(
    model: VideoModel,
    context: RunContext,
    track: Track,
    steps: Sequence[int],
    control: AttentionControl,
    scheduler: SchedulerName | None = None,
) -> Iterator[Denoised]:
    embeds = model.encode_prompts([PROMPT, Prompt("", ())])
    return replay(
        model,
        context,
        Run(tuple(steps), start="source"),
        prompt_embeds=embeds[:1],
        negative_embeds=embeds[1:],
        track=track,
        sampling=sampling_of(scheduler or model.facts.schedulers[0]),
        control=control,
    )


def sample(model: VideoModel, **how: Any) -> Tensor:
    """Return the latents of the last step."""
    return deque(steps_of(model, **how), maxlen=1)[0].latents


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def tiny(request: pytest.FixtureRequest) -> TinyFamily:
    return TINY_FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(tiny: TinyFamily, request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(tiny.fixture)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> VideoModel:
    return load_tiny(folder)


@pytest.fixture(params=[0, 1], ids=["first scheduler", "second scheduler"])
def scheduler(request: pytest.FixtureRequest, model: VideoModel) -> SchedulerName:
    schedulers: tuple[SchedulerName, ...] = model.facts.schedulers
    found: SchedulerName = schedulers[request.param]
    return found


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("control", [None, Observer()], ids=["no control", "observer"])
def test_latents_are_bitwise_those_of_the_stock_pipeline(
    tiny: TinyFamily,
    folder: Path,
    model: VideoModel,
    scheduler: SchedulerName,
    guidance_scale: float,
    control: AttentionControl | None,
) -> None:
    expected = tiny.stock_latents(folder, scheduler=scheduler, guidance_scale=guidance_scale)
    actual = sample(model, scheduler=scheduler, guidance_scale=guidance_scale, control=control)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_latents_are_bitwise_those_of_the_stock_pipeline_in_bfloat16(
    tiny: TinyFamily, folder: Path, scheduler: SchedulerName
) -> None:
    model = load_tiny(folder, "bfloat16")
    expected = tiny.stock_latents(
        folder, scheduler=scheduler, guidance_scale=3.0, dtype=torch.bfloat16
    )
    actual = sample(model, scheduler=scheduler, control=Observer())
    # The Euler solver rounds to the prediction's dtype; we keep Wan's latents in fp32.
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=0)


def recorder_of(
    model: VideoModel, context: RunContext, sink: MemoryPieces, run: Run | None = None
) -> RunControl:
    """Return the control that records an identity of 4 steps, at the first 3, in both branches."""
    overrides = ["sampling.num_steps=4", "method.mask_step=2", "method.inject_steps=[0, 3]"]
    config = RenderConfig.from_yaml(None, [*overrides, "method.profile=paper"])
    method = build_method(resolve_config(config, model.facts))
    tokens = PromptTokenizer.load(model.facts).tokenize(PROMPT)
    given = RunInputs(run or method.runs("identity")[0], context, tokens, MemoryPieces(), sink)
    return method.control("identity", 0, given)


def test_recording_an_identity_video_leaves_its_latents_bitwise_unchanged(
    tiny: TinyFamily, folder: Path, model: VideoModel, scheduler: SchedulerName
) -> None:
    context, sink = context_of(model), MemoryPieces()
    recorder = recorder_of(model, context, sink)
    actual = sample(model, context=context, scheduler=scheduler, control=recorder)
    expected = tiny.stock_latents(folder, scheduler=scheduler, guidance_scale=3.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    # Keys and values of all 3 layers and both branches: 72 tokens x all channels x 4 bytes each.
    channels = model.facts.num_heads * model.facts.head_dim
    assert sink.nbytes == 3 * 3 * 2 * (2 * 72 * channels * 4)
    assert recorder.observation is not None
    assert recorder.observation.foreground is not None
    assert recorder.observation.foreground.mask_N.shape == (72,)


def test_a_control_sees_every_step_layer_and_branch_once(model: VideoModel) -> None:
    observer = Observer()
    sample(model, num_steps=2, control=observer)
    assert observer.sites == [
        AttentionSite(step, layer, branch)
        for step in range(2)
        for branches in model.facts.passes
        for layer in range(3)
        for branch in branches
    ]


def test_without_guidance_there_is_one_branch(model: VideoModel) -> None:
    observer = Observer()
    sample(model, num_steps=1, guidance_scale=1.0, control=observer)
    assert {site.branch for site in observer.sites} == {"cond"}


def test_what_a_control_changes_reaches_the_latents(model: VideoModel) -> None:
    assert not torch.equal(sample(model, control=Louder()), sample(model))


def test_a_main_run_after_a_pre_pass_is_as_without_one(
    model: VideoModel, scheduler: SchedulerName
) -> None:
    expected = sample(model, scheduler=scheduler)
    sample(model, scheduler=scheduler, steps=range(3))
    actual = sample(model, scheduler=scheduler)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_pre_pass_ends_behind_the_forward_of_its_last_step(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Observer()
    (first, _, _), (second, actual, _) = steps_of(model, control=observer, steps=range(2))
    assert {site.step for site in observer.sites} == {0, 1}
    assert (first, second) == (0, 1)

    inputs: list[Tensor] = []
    predict = model.predict

    def watched(latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, **how: Any) -> Tensor:
        inputs.append(latents)
        return predict(latents, timestep, prompt_embeds)

    monkeypatch.setattr(model, "predict", watched)
    sample(model)
    # The scheduler has not stepped: these are the latents that the full run had at step 1.
    expected = inputs[len(model.facts.passes)][:1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_dpm_noise_depends_on_the_noise_seed(tiny_cogvideox_folder: Path) -> None:
    model = load_tiny(tiny_cogvideox_folder)
    one, other = (sample(model, scheduler="dpm", noise_seed=seed) for seed in (SEED, SEED + 1))
    assert not torch.equal(one, other)


def test_processors_come_back_when_a_step_fails(model: VideoModel) -> None:
    class Failing(Observer):
        def before(self, site: AttentionSite, qkv: QKV) -> QKV:
            if site.step == 1:
                raise StepError
            return super().before(site, qkv)

    original = model.transformer.attn_processors
    observer = Failing()
    with pytest.raises(StepError):
        sample(model, control=observer)
    assert {site.step for site in observer.sites} == {0}
    assert model.transformer.attn_processors == original


def test_the_estimate_becomes_the_result(model: VideoModel, scheduler: SchedulerName) -> None:
    *_, before, last = steps_of(model, scheduler=scheduler)
    torch.testing.assert_close(last.estimate, last.latents, rtol=0, atol=1e-6)
    assert not torch.equal(before.estimate, before.latents)


def test_closing_a_run_ends_it_after_its_step(model: VideoModel) -> None:
    original = model.transformer.attn_processors
    observer = Observer()
    steps = steps_of(model, control=observer)
    next(steps)
    assert model.transformer.attn_processors == original  # between steps they are the model's own
    steps.close()  # type: ignore[attr-defined]
    assert {site.step for site in observer.sites} == {0}
    assert model.transformer.attn_processors == original


def test_two_interleaved_runs_are_each_as_alone(
    model: VideoModel, scheduler: SchedulerName
) -> None:
    original = model.transformer.attn_processors
    alone = [sample(model, scheduler=scheduler, control=c) for c in (Observer(), Louder())]
    observers = (Observer(), Observer())
    first = steps_of(model, scheduler=scheduler, control=observers[0])
    second = steps_of(model, scheduler=scheduler, control=Louder())
    third = steps_of(model, scheduler=scheduler, control=observers[1])
    for one, other, _ in zip(first, second, third, strict=True):
        ends = (one.latents, other.latents)
    for latents, expected in zip(ends, alone, strict=True):
        torch.testing.assert_close(latents, expected, rtol=0, atol=0)
    assert observers[0].sites == observers[1].sites  # each saw its own calls, and all of them
    assert len(observers[0].sites) == 4 * 3 * 2
    assert model.transformer.attn_processors == original


def test_what_happens_to_one_of_two_interleaved_runs_leaves_the_other(model: VideoModel) -> None:
    expected = sample(model, control=Louder())
    original = model.transformer.attn_processors

    class Failing(Observer):
        def before(self, site: AttentionSite, qkv: QKV) -> QKV:
            raise StepError

    steps = steps_of(model, control=Louder())
    next(steps)
    with pytest.raises(StepError):
        sample(model, control=Failing())
    next(steps)
    closed = steps_of(model, control=Observer())
    next(closed)
    closed.close()  # type: ignore[attr-defined]
    latents = deque(steps, maxlen=1)[0].latents
    torch.testing.assert_close(latents, expected, rtol=0, atol=0)
    assert model.transformer.attn_processors == original


class Guide(AttentionControl):
    """Notes what it is asked to guide and told of steps; guides as the stock pipelines, or not."""

    def __init__(self, *, is_stock: bool) -> None:
        self.is_stock = is_stock
        self.guided: list[Guided] = []
        self.done: list[Denoised] = []

    def guide(self, predicted: Guided) -> Tensor:
        self.guided.append(predicted)
        return super().guide(predicted) if self.is_stock else predicted.cond

    def stepped(self, done: Denoised) -> None:
        self.done.append(done)


def test_a_control_guides_and_hears_of_every_step(
    model: VideoModel, scheduler: SchedulerName
) -> None:
    expected = sample(model, scheduler=scheduler)
    guide = Guide(is_stock=True)
    told = list(steps_of(model, scheduler=scheduler, control=guide))
    torch.testing.assert_close(told[-1].latents, expected, rtol=0, atol=0)
    assert [(at.step, at.scale) for at in guide.guided] == [(step, 3.0) for step in range(4)]
    assert [done.step for done in guide.done] == [0, 1, 2, 3]
    assert all(seen is done for seen, done in zip(guide.done, told, strict=True))
    for before, at in zip(told, guide.guided[1:], strict=False):
        assert torch.equal(at.latents, before.latents)
    changed = sample(model, scheduler=scheduler, control=Guide(is_stock=False))
    assert not torch.equal(changed, expected)


def test_without_guidance_a_control_is_given_one_prediction(model: VideoModel) -> None:
    guide = Guide(is_stock=True)
    sample(model, guidance_scale=1.0, control=guide)
    assert all(at.uncond is None for at in guide.guided)


def test_what_a_control_is_given_to_estimate_with_is_the_solver(
    model: VideoModel, scheduler: SchedulerName
) -> None:
    guide = Guide(is_stock=True)
    told = list(steps_of(model, scheduler=scheduler, control=guide))
    for at, done in zip(guide.guided, told, strict=True):
        estimate = at.estimate(AttentionControl().guide(at)).to(done.estimate.dtype)
        torch.testing.assert_close(estimate, done.estimate, rtol=1e-5, atol=1e-5)


def test_the_replay_of_a_sampled_track_records_what_its_sampling_recorded(
    model: VideoModel, scheduler: SchedulerName
) -> None:
    """Pieces, mask and features, bit by bit: what a source leaves is what an identity leaves."""
    context, sampled = context_of(model), MemoryPieces()
    recorder = recorder_of(model, context, sampled)
    latents = [model.initial_noise(SEED, VIDEO)]
    latents += [
        done.latents
        for done in steps_of(model, context=context, scheduler=scheduler, control=recorder)
    ]

    context, kept = context_of(model), MemoryPieces()
    run = Run((0, 1, 2), start="source", records=(0, 1, 2))
    again = recorder_of(model, context, kept, run)
    track = Track(latents[-1], lambda step: latents[step])
    steps = replayed(model, context, track, run.steps, again, scheduler)
    for step, done in enumerate(steps):
        assert done.step == step
        assert torch.equal(done.latents, latents[step])
    assert kept.nbytes == sampled.nbytes > 0
    for step in range(3):
        for layer in range(3):
            for branch in ("uncond", "cond"):
                site = AttentionSite(step, layer, branch)
                for kind in ("key", "value"):
                    first, second = sampled.get(site).pieces, kept.get(site).pieces
                    assert torch.equal(first[kind], second[kind])
    one, other = _seen(recorder), _seen(again)
    assert one.foreground is not None
    assert other.foreground is not None
    assert torch.equal(one.foreground.score_N, other.foreground.score_N)
    assert one.features.keys() == other.features.keys() != set()
    assert all(torch.equal(one.features[layer], other.features[layer]) for layer in one.features)


def _seen(control: RunControl) -> Observation:
    assert control.observation is not None
    return control.observation


def test_a_finished_video_is_noised_to_each_step(model: VideoModel) -> None:
    noise, clean = (model.initial_noise(seed, VIDEO) for seed in (SEED, 9))
    sampling = sampling_of(model.facts.schedulers[0], num_steps=100)
    track = source_track(model, clean, noise, sampling)
    distances = [float((track.before(step) - clean).norm()) for step in range(0, 100, 9)]
    assert distances == sorted(distances, reverse=True)
    torch.testing.assert_close(track.before(0), noise, rtol=0, atol=0.06)
    torch.testing.assert_close(track.before(99), clean, rtol=0, atol=0.5)


def test_any_step_can_be_replayed_alone(model: VideoModel) -> None:
    noise, clean = (model.initial_noise(seed, VIDEO) for seed in (SEED, 9))
    track = source_track(model, clean, noise, sampling_of(model.facts.schedulers[0]))
    whole, alone = MemoryPieces(), MemoryPieces()
    for sink, steps in ((whole, (0, 1, 2)), (alone, (1,))):
        context, run = context_of(model), Run(steps, start="source", records=steps)
        control = recorder_of(model, context, sink, run)
        deque(replayed(model, context, track, steps, control), maxlen=0)
    site = AttentionSite(1, 2, "cond")
    assert torch.equal(whole.get(site).pieces["key"], alone.get(site).pieces["key"])


def test_defaults_of_the_model_are_enough_to_sample(model: VideoModel) -> None:
    config = resolve_config(RenderConfig(), model.facts)
    embeds = model.encode_prompts([PROMPT, Prompt("", ())])
    ((_, latents, _),) = denoise(
        model,
        RunContext(layout=model.layout(config.video), rotary=model.rotary(config.video)),
        Run((0,)),
        prompt_embeds=embeds[:1],
        negative_embeds=embeds[1:],
        noise=model.initial_noise(SEED, config.video),
        noise_seed=SEED,
        sampling=config.sampling.model_copy(update={"num_steps": 1}),
    )
    assert latents.isfinite().all()
