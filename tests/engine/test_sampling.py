from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionControl, KVGroup
from bachvid.catalog.registry import load_facts
from bachvid.engine.sampling import Denoised, denoise
from bachvid.inputs.sections import ModelConfig, SamplingConfig, VideoConfig
from bachvid.kv.cache import MemoryKVStore
from bachvid.layout.records import AttentionSite
from bachvid.methods.bachvid import IdentityRecorder
from bachvid.methods.base import MethodSettings
from bachvid.models.base import VideoModel
from bachvid.models.registry import load_model
from bachvid.planning.config import RenderConfig
from bachvid.planning.resolve import resolve_config
from bachvid.prompts.compose import Prompt, compose_prompt
from bachvid.prompts.tokenizer import PromptTokenizer

PROMPT = compose_prompt("a snowy forest", "a girl in a yellow dress", "jumps")
SEED = 7
FOLDERS = ("tiny_cogvideox_folder", "tiny_cogvideox_2b_folder", "tiny_wan_folder")
VIDEO = VideoConfig(pixel_frames=5, height=32, width=48)


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


def load(folder: Path) -> VideoModel:
    config = ModelConfig(id=str(folder), device="cpu")
    return load_model(config, load_facts(config))


def run_of(model: VideoModel) -> RunContext:
    return RunContext(layout=model.layout(VIDEO), rotary=model.rotary(VIDEO))


def steps_of(
    model: VideoModel,
    *,
    run: RunContext | None = None,
    scheduler: str | None = None,
    guidance_scale: float = 3.0,
    num_steps: int = 4,
    control: AttentionControl | None = None,
    stop_after: int | None = None,
) -> Iterator[Denoised]:
    embeds = model.encode_prompts([PROMPT, Prompt("", ())])
    return denoise(
        model,
        run or run_of(model),
        prompt_embeds=embeds[:1],
        negative_embeds=embeds[1:],
        noise=model.initial_noise(SEED, VIDEO),
        noise_seed=SEED,
        sampling=SamplingConfig(
            scheduler=scheduler or model.facts.schedulers[0],
            num_steps=num_steps,
            guidance_scale=guidance_scale,
        ),
        control=control,
        stop_after=stop_after,
    )


def sample(model: VideoModel, **how: Any) -> Tensor:
    """Return the latents of the last step."""
    return deque(steps_of(model, **how), maxlen=1)[0].latents


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> VideoModel:
    return load(folder)


@pytest.fixture(params=[0, 1], ids=["first scheduler", "second scheduler"])
def scheduler(request: pytest.FixtureRequest, model: VideoModel) -> str:
    return model.facts.schedulers[request.param]


def stock_latents(
    folder: Path, *, scheduler: str, guidance_scale: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler == "dpm":
        pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    if scheduler == "euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
            shift=pipeline.scheduler.config.flow_shift
        )
    return pipeline(
        PROMPT.text,
        num_frames=VIDEO.pixel_frames,
        height=VIDEO.height,
        width=VIDEO.width,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).frames


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("control", [None, Observer()], ids=["no control", "observer"])
def test_latents_are_bitwise_those_of_the_stock_pipeline(
    folder: Path,
    model: VideoModel,
    scheduler: str,
    guidance_scale: float,
    control: AttentionControl | None,
) -> None:
    expected = stock_latents(folder, scheduler=scheduler, guidance_scale=guidance_scale)
    actual = sample(model, scheduler=scheduler, guidance_scale=guidance_scale, control=control)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_latents_are_bitwise_those_of_the_stock_pipeline_in_bfloat16(
    folder: Path, scheduler: str
) -> None:
    config = ModelConfig(id=str(folder), device="cpu", dtype="bfloat16")
    model = load_model(config, load_facts(config))
    expected = stock_latents(folder, scheduler=scheduler, guidance_scale=3.0, dtype=torch.bfloat16)
    actual = sample(model, scheduler=scheduler, control=Observer())
    # The Euler solver rounds to the prediction's dtype; we keep Wan's latents in fp32.
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=0)


def test_recording_an_identity_video_leaves_its_latents_bitwise_unchanged(
    folder: Path, model: VideoModel, scheduler: str
) -> None:
    overrides = ["sampling.num_steps=4", "method.mask_step=2", "method.inject_steps=[0, 3]"]
    overrides.append("method.profile=paper")  # both branches
    config = resolve_config(RenderConfig.from_yaml(None, overrides), model.facts)
    run, store = run_of(model), MemoryKVStore()
    recorder = IdentityRecorder(
        run,
        PromptTokenizer.load(model.facts).tokenize(PROMPT),
        MethodSettings.from_config(config.method),
        store=store,
        steps=range(3),
        config_hash="",
    )
    actual = sample(model, run=run, scheduler=scheduler, control=recorder)
    expected = stock_latents(folder, scheduler=scheduler, guidance_scale=3.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    # Keys and values of all 3 layers and both branches: 72 tokens x all channels x 4 bytes each.
    channels = model.facts.num_heads * model.facts.head_dim
    assert store.nbytes == 3 * 3 * 2 * (2 * 72 * channels * 4)
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


def test_a_main_run_after_a_pre_pass_is_as_without_one(model: VideoModel, scheduler: str) -> None:
    expected = sample(model, scheduler=scheduler)
    sample(model, scheduler=scheduler, stop_after=2)
    actual = sample(model, scheduler=scheduler)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_pre_pass_ends_behind_the_forward_of_its_last_step(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Observer()
    (first, _, _), (second, actual, _) = steps_of(model, control=observer, stop_after=1)
    assert {site.step for site in observer.sites} == {0, 1}
    assert (first, second) == (0, 1)

    inputs: list[Tensor] = []
    predict = model.predict

    def watched(latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        inputs.append(latents)
        return predict(latents, timestep, prompt_embeds)

    monkeypatch.setattr(model, "predict", watched)
    sample(model)
    # The scheduler has not stepped: these are the latents that the full run had at step 1.
    expected = inputs[len(model.facts.passes)][:1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_dpm_noise_depends_on_the_noise_seed(tiny_cogvideox_folder: Path) -> None:
    model = load(tiny_cogvideox_folder)
    embeds = model.encode_prompts([PROMPT, Prompt("", ())])
    noise = model.initial_noise(SEED, VIDEO)
    one, other = (
        deque(
            denoise(
                model,
                run_of(model),
                prompt_embeds=embeds[:1],
                negative_embeds=embeds[1:],
                noise=noise,
                noise_seed=seed,
                sampling=SamplingConfig(scheduler="dpm", num_steps=4, guidance_scale=3.0),
            ),
            maxlen=1,
        )[0].latents
        for seed in (SEED, SEED + 1)
    )
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


def test_the_estimate_becomes_the_result(model: VideoModel, scheduler: str) -> None:
    *_, before, last = steps_of(model, scheduler=scheduler)
    torch.testing.assert_close(last.estimate, last.latents, rtol=0, atol=1e-6)
    assert not torch.equal(before.estimate, before.latents)


def test_closing_a_run_ends_it_after_its_step(model: VideoModel) -> None:
    original = model.transformer.attn_processors
    observer = Observer()
    steps = steps_of(model, control=observer)
    next(steps)
    assert model.transformer.attn_processors != original
    steps.close()  # type: ignore[attr-defined]
    assert {site.step for site in observer.sites} == {0}
    assert model.transformer.attn_processors == original


def test_defaults_of_the_model_are_enough_to_sample(folder: Path, model: VideoModel) -> None:
    config = resolve_config(RenderConfig(model=ModelConfig(id=str(folder))), model.facts)
    embeds = model.encode_prompts([PROMPT, Prompt("", ())])
    ((_, latents, _),) = denoise(
        model,
        RunContext(layout=model.layout(config.video), rotary=model.rotary(config.video)),
        prompt_embeds=embeds[:1],
        negative_embeds=embeds[1:],
        noise=model.initial_noise(SEED, config.video),
        noise_seed=SEED,
        sampling=config.sampling.model_copy(update={"num_steps": 1}),
    )
    assert latents.isfinite().all()
