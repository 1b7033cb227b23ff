from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.attention.control import AttentionControl
from bachvid.catalog.registry import load_facts
from bachvid.engine.sampling import denoise
from bachvid.errors import BachvidError, ConfigError, ModelSupportError
from bachvid.inputs.sections import ModelConfig, SamplingConfig, VideoConfig
from bachvid.inputs.story import Story
from bachvid.kv.cache import MemoryKVStore
from bachvid.layout.records import AttentionSite
from bachvid.methods.bachvid import IdentityRecorder
from bachvid.methods.base import MethodSettings
from bachvid.models import wan
from bachvid.models.base import VideoModel, attention_control
from bachvid.models.registry import load_model
from bachvid.models.wan import WanCrossAttention, WanModel, WanSelfAttention
from bachvid.planning.config import RenderConfig
from bachvid.planning.plan import render_plan
from bachvid.planning.resolve import resolve_config
from bachvid.prompts.compose import Prompt, compose_prompt, noun_ranges
from bachvid.prompts.tokenizer import PromptTokenizer

WORDS = {
    "background": noun_ranges("a snowy forest", None),
    "character": noun_ranges("a girl in a yellow dress", ["girl", "dress"]),
}
PROMPT = compose_prompt("a snowy forest", "a girl in a yellow dress", "jumps", words=WORDS)
VIDEO = VideoConfig(pixel_frames=5, height=32, width=48)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(folder: Path, *, dtype: str | None = None) -> VideoModel:
    config = ModelConfig(id=str(folder), device="cpu", dtype=dtype)
    return load_model(config, load_facts(config))


def run_of(model: VideoModel) -> RunContext:
    return RunContext(layout=model.layout(VIDEO), rotary=model.rotary(VIDEO))


@pytest.fixture(scope="module")
def model(tiny_wan_folder: Path) -> VideoModel:
    return load(tiny_wan_folder)


@pytest.fixture(scope="module")
def pipeline(tiny_wan_folder: Path) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(tiny_wan_folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- what the model gives is what the stock pipeline gives; its latents: tests/test_sampling.py --


@torch.no_grad()
def test_prompt_embeddings_are_bitwise_those_of_the_stock_pipeline(
    model: VideoModel, pipeline: WanPipeline
) -> None:
    expected, negative = pipeline.encode_prompt(PROMPT.text, "", max_sequence_length=16)
    actual = model.encode_prompts([PROMPT, Prompt(""), PROMPT])
    torch.testing.assert_close(actual[:1], expected, rtol=0, atol=0)
    torch.testing.assert_close(actual[1:2], negative, rtol=0, atol=0)
    torch.testing.assert_close(actual[2:], expected, rtol=0, atol=0)
    assert (actual[0, 13:] == 0).all()  # 12 words and commas, and the end
    assert (actual[0, :13] != 0).any(dim=-1).all()


def test_what_the_stock_pipeline_cleans_is_clean_in_the_plan(
    tiny_wan_folder: Path, pipeline: WanPipeline
) -> None:
    story = {
        "title": "Escapes",
        "scenes": [
            {
                "id": "one",
                "background": "a snowy&nbsp;forest",
                "character": "a cat &amp;amp; a dog",
                "actions": ["jumps &#97;nd runs"],
                "nouns": {"background": ["snowy&nbsp;forest"], "character": ["cat", "dog"]},
            }
        ],
    }
    overrides = [f"model.id={tiny_wan_folder}", "sampling.negative_prompt=dark&nbsp; sea"]
    plan = render_plan(Story.model_validate(story), RenderConfig.from_yaml(None, overrides))
    (scene,) = plan.scenes
    (frame,) = scene.frames
    raw = "a snowy&nbsp;forest, a cat &amp;amp; a dog, jumps &#97;nd runs"
    assert frame.prompt.text == prompt_clean(raw) == "a snowy forest, a cat & a dog, jumps and runs"
    expected = pipeline.tokenizer(prompt_clean(raw), padding="max_length", max_length=16)
    assert frame.tokens is not None
    assert list(frame.tokens.ids) == expected["input_ids"]
    assert frame.tokens.rows == {"background": (1, 2), "character": (5, 8), "action": (10, 11, 12)}
    assert plan.config.sampling.negative_prompt == "dark sea"


def test_initial_noise_is_that_of_the_stock_pipeline(
    tiny_wan_folder: Path, pipeline: WanPipeline
) -> None:
    expected = pipeline.prepare_latents(
        1, 4, 32, 48, 5, torch.float32, "cpu", torch.Generator().manual_seed(3)
    )
    for dtype in ("float32", "bfloat16"):  # fp32 also where the weights are not
        noise = load(tiny_wan_folder, dtype=dtype).initial_noise(3, VIDEO)
        torch.testing.assert_close(noise, expected, rtol=0, atol=0)


def stock_pictures(pipeline: WanPipeline, latents: Tensor) -> NDArray[np.uint8]:
    """Decode as the stock pipeline does behind its last step."""
    mean, std = (
        torch.tensor(values).view(1, 4, 1, 1, 1)
        for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    with torch.no_grad():
        video = pipeline.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
    pictures = pipeline.video_processor.postprocess_video(video, output_type="pil")[0]
    return np.stack([np.asarray(picture) for picture in pictures])


def test_decoded_frames_are_the_pictures_of_the_stock_pipeline(
    model: VideoModel, pipeline: WanPipeline
) -> None:
    pictures = pipeline(
        PROMPT.text,
        num_frames=5,
        height=32,
        width=48,
        num_inference_steps=1,
        guidance_scale=1.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(7),
        output_type="pil",
    ).frames[0]
    expected = np.stack([np.asarray(picture) for picture in pictures])
    *_, last = denoise(
        model,
        run_of(model),
        prompt_embeds=model.encode_prompts([PROMPT]),
        negative_embeds=None,
        noise=model.initial_noise(7, VIDEO),
        noise_seed=7,
        sampling=SamplingConfig(scheduler="unipc", num_steps=1, guidance_scale=1.0),
    )
    actual = model.decode(last.latents)
    assert (actual.shape, actual.dtype) == ((5, 32, 48, 3), np.uint8)
    assert actual.std() > 1
    np.testing.assert_array_equal(actual, expected)


def test_only_large_videos_are_decoded_in_tiles(
    model: VideoModel, pipeline: WanPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wan, "TILED_ABOVE_PIXELS", 32 * 288)
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.randn(1, 4, 2, 8, w, generator=generator) for w in (72, 84))
    whole = stock_pictures(pipeline, large)
    pipeline.vae.enable_tiling()
    tiled = stock_pictures(pipeline, large)
    pipeline.vae.disable_tiling()
    assert not np.array_equal(tiled, whole)
    np.testing.assert_array_equal(model.decode(large), tiled)
    np.testing.assert_array_equal(model.decode(small), stock_pictures(pipeline, small))


def test_timesteps_that_are_equal_are_steps_of_their_own(
    model: VideoModel, pipeline: WanPipeline
) -> None:
    """With many steps the first whole-numbered timestep stands twice in the list."""

    def stop(pipeline: WanPipeline, step: int, timestep: Tensor, tensors: Any) -> dict[str, Tensor]:
        pipeline._interrupt = True
        return {}

    how = {"num_inference_steps": 600, "guidance_scale": 1.0, "max_sequence_length": 16}
    size = {"num_frames": 5, "height": 32, "width": 48}
    expected = pipeline(
        PROMPT.text,
        **how,
        **size,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        callback_on_step_end=stop,
    ).frames
    assert pipeline.scheduler.timesteps[0] == pipeline.scheduler.timesteps[1]
    steps = denoise(
        model,
        run_of(model),
        prompt_embeds=model.encode_prompts([PROMPT]),
        negative_embeds=None,
        noise=model.initial_noise(7, VIDEO),
        noise_seed=7,
        sampling=SamplingConfig(scheduler="unipc", num_steps=600, guidance_scale=1.0),
    )
    torch.testing.assert_close(next(steps).latents, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["unipc", "euler"])
@pytest.mark.parametrize("saved", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_both_schedulers_take_the_shift_of_the_folder(
    tiny_wan_folder: Path, tmp_path: Path, saved: str, name: str
) -> None:
    folder = shutil.copytree(tiny_wan_folder, tmp_path / "model")
    edit_json(folder / "model_index.json", scheduler=["diffusers", saved])
    key = "flow_shift" if saved.startswith("UniPC") else "shift"
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": saved, "num_train_timesteps": 1000, key: 5.0})
    )
    scheduler = load(folder).scheduler(name)
    assert len(scheduler.timesteps) == 1000  # fresh
    scheduler.set_timesteps(2, device=torch.device("cpu"))
    middle = scheduler.timesteps[1] / 1000
    unshifted = {"unipc": 0.5005, "euler": None}[name]
    if unshifted is None:  # from the largest to the smallest of its shifted sigmas, shifted again
        unshifted = 5 * 0.001 / (1 + 4 * 0.001)
    assert float(middle) == pytest.approx(5 * unshifted / (1 + 4 * unshifted), abs=2e-3)


def test_layout_and_rotary_are_those_of_the_video(model: VideoModel, pipeline: WanPipeline) -> None:
    layout, rotary = model.layout(VIDEO), model.rotary(VIDEO)
    assert (layout.grid, layout.text_tokens, layout.joint_tokens) == ((3, 4, 6), 0, 72)
    cos, sin = pipeline.transformer.rope(model.initial_noise(0, VIDEO))
    torch.testing.assert_close(rotary.cos_ND, cos[0, :, 0], rtol=0, atol=0)
    torch.testing.assert_close(rotary.sin_ND, sin[0, :, 0], rtol=0, atol=0)


def test_an_illegal_size_is_refused(model: VideoModel) -> None:
    with pytest.raises(ConfigError, match="multiple of 16; nearest are 32 and 48"):
        model.layout(VideoConfig(pixel_frames=5, height=40, width=48))


def test_a_dtype_can_be_chosen_but_the_autoencoder_stays_in_fp32(tiny_wan_folder: Path) -> None:
    model = load(tiny_wan_folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.encode_prompts([PROMPT]).dtype == torch.bfloat16
    latents = model.initial_noise(1, VIDEO)
    expected = load(tiny_wan_folder).decode(latents)
    np.testing.assert_array_equal(model.decode(latents), expected)


# --- processors and what a method sees ----------------------------------------------------------


def test_attention_control_reaches_every_layer_and_restores(model: VideoModel) -> None:
    original = model.transformer.attn_processors
    with attention_control(model, run_of(model), AttentionControl()):
        inside = model.transformer.attn_processors
    kinds = {"attn1": WanSelfAttention, "attn2": WanCrossAttention}
    assert {path: (type(p), p.layer) for path, p in inside.items()} == {
        f"blocks.{layer}.{name}.processor": (kind, layer)
        for layer in range(3)
        for name, kind in kinds.items()
    }
    assert model.transformer.attn_processors == original
    assert {type(p) for p in original.values()} == {WanAttnProcessor}


def test_the_mask_is_of_the_attention_that_nouns_get(
    model: VideoModel, pipeline: WanPipeline
) -> None:
    """Beside softmax over all text tokens, taken from the stock model's own projections."""
    overrides = ["sampling.num_steps=2", "method.mask_step=0", "method.inject_steps=[0, 1]"]
    settings = MethodSettings.from_config(
        resolve_config(RenderConfig.from_yaml(None, overrides), model.facts).method
    )
    assert settings.mask_layers == (0,)
    attention = pipeline.transformer.blocks[0].attn2
    seen: dict[str, Tensor] = {}
    for norm in ("norm_q", "norm_k"):
        attention.get_submodule(norm).register_forward_hook(
            lambda module, args, out, norm=norm: seen.__setitem__(norm, out)
        )
    embeds, noise = model.encode_prompts([PROMPT]), model.initial_noise(7, VIDEO)
    run, tokens = run_of(model), PromptTokenizer.load(model.facts).tokenize(PROMPT)
    # a snowy forest , a girl in a yellow dress , jumps </s>
    assert tokens.rows["background"] == (1, 2)
    assert tokens.rows["character"] == (5, 9)
    recorder = IdentityRecorder(
        run, tokens, settings, store=MemoryKVStore(), steps=(0,), config_hash=""
    )
    steps = denoise(
        model,
        run,
        prompt_embeds=embeds,
        negative_embeds=model.encode_prompts([Prompt("")]),
        noise=noise,
        noise_seed=7,
        sampling=SamplingConfig(scheduler="unipc", num_steps=2, guidance_scale=3.0),
        control=recorder,
        stop_after=0,
    )
    deque(steps, maxlen=0)

    scheduler = model.scheduler("unipc")
    scheduler.set_timesteps(2, device=model.device)
    with torch.no_grad():
        pipeline.transformer(noise, scheduler.timesteps[:1], embeds)
    query, key = (seen[norm].double().unflatten(2, (6, -1)).transpose(1, 2) for norm in seen)
    weights = (query @ key.mT * 12**-0.5).softmax(dim=-1)[0].mean(dim=0)
    background, character = (
        weights[:, list(tokens.rows[part])].mean(dim=1) for part in ("background", "character")
    )
    actual = recorder.observation.foreground
    torch.testing.assert_close(actual.score_N, (character - background).float(), rtol=0, atol=1e-6)


def test_what_attends_to_text_is_looked_at_once_per_site(model: VideoModel) -> None:
    seen: list[tuple[AttentionSite, tuple[int, ...], tuple[int, ...]]] = []

    class Watcher(AttentionControl):
        def cross(self, site: AttentionSite, query_BSHD: Tensor, key_BTHD: Tensor) -> None:
            seen.append((site, tuple(query_BSHD.shape), tuple(key_BTHD.shape)))

    embeds = model.encode_prompts([PROMPT, Prompt("")])
    steps = denoise(
        model,
        run_of(model),
        prompt_embeds=embeds[:1],
        negative_embeds=embeds[1:],
        noise=model.initial_noise(7, VIDEO),
        noise_seed=7,
        sampling=SamplingConfig(scheduler="euler", num_steps=1, guidance_scale=3.0),
        control=Watcher(),
    )
    deque(steps, maxlen=0)
    assert seen == [
        (AttentionSite(0, layer, branch), (1, 72, 6, 12), (1, 16, 6, 12))
        for branch in ("cond", "uncond")
        for layer in range(3)
    ]


# --- the published models, without their weights ------------------------------------------------

PUBLISHED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {
        "num_layers": 30,
        "num_attention_heads": 12,
        "ffn_dim": 8960,
    },
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {
        "num_layers": 40,
        "num_attention_heads": 40,
        "ffn_dim": 13824,
    },
}


@pytest.mark.parametrize(("hub_id", "billions"), list(zip(PUBLISHED, (1.42, 14.29), strict=True)))
def test_facts_fit_the_published_transformer(hub_id: str, billions: float) -> None:
    with torch.device("meta"):
        transformer = WanTransformer3DModel(text_dim=4096, **PUBLISHED[hub_id])
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)
    facts = load_facts(ModelConfig(id=hub_id))
    assert list(transformer.attn_processors) == [
        f"blocks.{layer}.{name}.processor"
        for layer in range(facts.num_layers)
        for name in ("attn1", "attn2")
    ]
    attention = transformer.blocks[0].attn1
    assert attention.heads == facts.num_heads
    assert attention.inner_dim == facts.num_heads * facts.head_dim
    config = transformer.config
    assert config.attention_head_dim == facts.head_dim == 128
    assert config.text_dim == facts.text_dim == 4096
    assert config.in_channels == facts.latent_channels == 16
    assert config.patch_size == (1, facts.patch_size, facts.patch_size)
    defaults = facts.defaults
    grid = facts.grid(defaults.pixel_frames, defaults.height, defaults.width)
    assert grid == (21, 30, 52)


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_the_adapter_runs_the_published_transformer_at_full_size(hub_id: str) -> None:
    """Shapes only: nothing is computed on the meta device."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(text_dim=4096, **PUBLISHED[hub_id] | {"num_layers": 2})
    facts = replace(load_facts(ModelConfig(id=hub_id)), num_layers=2)
    model = WanModel(
        facts,
        transformer=transformer,
        vae=None,
        load_text_encoder=lambda: None,
        scheduler_config={},
        device=transformer.device,
    )
    video = VideoConfig(pixel_frames=81, height=480, width=832)
    run = RunContext(layout=model.layout(video), rotary=model.rotary(video), branches=("cond",))
    assert run.layout.joint_tokens == 32760
    latents = torch.empty(1, 16, 21, 60, 104, device="meta")
    with attention_control(model, run, AttentionControl()):
        prediction = model.predict(
            latents,
            torch.tensor(999, device="meta"),
            torch.empty(1, 512, 4096, device="meta"),
        )
    assert prediction.shape == latents.shape


# --- what cannot be loaded; more of it: test_cogvideox.py ----------------------------------------


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


DAMAGE: dict[str, tuple[Callable[[Path], None], type[BachvidError], str]] = {
    "a tensor is missing": (
        lambda f: drop_tensor(f / "transformer" / WEIGHTS),
        ConfigError,
        "the weights of its transformer lack 1 tensors",
    ),
    "another text encoder": (
        lambda f: edit_json(
            f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]
        ),
        ModelSupportError,
        "has a T5EncoderModel as its text_encoder: the adapter for wan knows UMT5EncoderModel",
    ),
    "another VAE": (
        lambda f: edit_json(f / "model_index.json", vae=["diffusers", "AutoencoderKLCogVideoX"]),
        ModelSupportError,
        "has a AutoencoderKLCogVideoX as its vae: .* AutoencoderKLWan",
    ),
    "another scheduler": (
        lambda f: edit_json(f / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        ModelSupportError,
        "knows UniPCMultistepScheduler and FlowMatchEulerDiscreteScheduler",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_cannot_be_rendered_with_is_refused(
    tiny_wan_folder: Path, tmp_path: Path, damage: str
) -> None:
    spoil, error, message = DAMAGE[damage]
    folder = shutil.copytree(tiny_wan_folder, tmp_path / "model")
    spoil(folder)
    with pytest.raises(error, match=message):
        load(folder)
