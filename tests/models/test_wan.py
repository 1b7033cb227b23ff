"""What only Wan has: a text attention of its own, flow shifts, an autoencoder in fp32."""

from __future__ import annotations

import json
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tiny_families import VIDEO, context_of, load_tiny, sampling_of
from torch import Tensor

from bachvid.attention.control import AttentionControl
from bachvid.engine.sampling import denoise
from bachvid.inputs.choices import SchedulerName
from bachvid.inputs.story import Story
from bachvid.inputs.words import Range
from bachvid.kv.cache import MemoryPieces
from bachvid.layout.records import AttentionSite
from bachvid.methods.base import Run, RunInputs
from bachvid.models.base import VideoModel
from bachvid.planning.config import RenderConfig
from bachvid.planning.plan import render_plan
from bachvid.planning.resolve import build_method, resolve_config
from bachvid.prompts.compose import Prompt, Segment, compose_prompt, noun_ranges
from bachvid.prompts.tokenizer import PromptTokenizer

WORDS: dict[Segment, tuple[Range, ...]] = {
    "background": noun_ranges("a snowy forest", None),
    "character": noun_ranges("a girl in a yellow dress", ["girl", "dress"]),
}
PROMPT = compose_prompt("a snowy forest", "a girl in a yellow dress", "jumps", words=WORDS)


@pytest.fixture(scope="module")
def model(tiny_wan_folder: Path) -> VideoModel:
    return load_tiny(tiny_wan_folder)


@pytest.fixture(scope="module")
def pipeline(tiny_wan_folder: Path) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(tiny_wan_folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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
        context_of(model),
        Run(tuple(range(600))),
        prompt_embeds=model.encode_prompts([PROMPT]),
        negative_embeds=None,
        noise=model.initial_noise(7, VIDEO),
        noise_seed=7,
        sampling=sampling_of("unipc", num_steps=600, guidance_scale=1.0),
    )
    torch.testing.assert_close(next(steps).latents, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["unipc", "euler"])
@pytest.mark.parametrize("saved", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_both_schedulers_take_the_shift_of_the_folder(
    tiny_wan_folder: Path, tmp_path: Path, saved: str, name: SchedulerName
) -> None:
    folder = shutil.copytree(tiny_wan_folder, tmp_path / "model")
    edit_json(folder / "model_index.json", scheduler=["diffusers", saved])
    key = "flow_shift" if saved.startswith("UniPC") else "shift"
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": saved, "num_train_timesteps": 1000, key: 5.0})
    )
    model = load_tiny(folder)
    assert model.facts.flow_shift == 5.0
    solver = model.solver(sampling_of(name, num_steps=2), model.initial_noise(0, VIDEO), 0)
    middle = solver.timesteps[1] / 1000
    unshifted = {"unipc": 0.5005, "euler": None}[name]
    if unshifted is None:  # from the largest to the smallest of its shifted sigmas, shifted again
        unshifted = 5 * 0.001 / (1 + 4 * 0.001)
    assert float(middle) == pytest.approx(5 * unshifted / (1 + 4 * unshifted), abs=2e-3)


def test_a_dtype_can_be_chosen_but_the_autoencoder_stays_in_fp32(tiny_wan_folder: Path) -> None:
    model = load_tiny(tiny_wan_folder, "bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.encode_prompts([PROMPT]).dtype == torch.bfloat16
    latents = model.initial_noise(1, VIDEO)
    expected = load_tiny(tiny_wan_folder).decode(latents)
    np.testing.assert_array_equal(model.decode(latents), expected)


def test_the_mask_is_of_the_attention_that_nouns_get(
    model: VideoModel, pipeline: WanPipeline
) -> None:
    """Beside softmax over all text tokens, taken from the stock model's own projections."""
    overrides = ["sampling.num_steps=2", "method.mask_step=0", "method.inject_steps=[0, 1]"]
    method = build_method(resolve_config(RenderConfig.from_yaml(None, overrides), model.facts))
    assert method.config.mask_layers == (0,)
    attention = pipeline.transformer.blocks[0].attn2
    seen: dict[str, Tensor] = {}
    for norm in ("norm_q", "norm_k"):
        attention.get_submodule(norm).register_forward_hook(
            lambda module, args, out, norm=norm: seen.__setitem__(norm, out)
        )
    embeds, noise = model.encode_prompts([PROMPT]), model.initial_noise(7, VIDEO)
    run, tokens = context_of(model), PromptTokenizer.load(model.facts).tokenize(PROMPT)
    # a snowy forest , a girl in a yellow dress , jumps </s>
    assert tokens.rows["background"] == (1, 2)
    assert tokens.rows["character"] == (5, 9)
    given = RunInputs(Run((0,), records=(0,)), run, tokens, MemoryPieces(), MemoryPieces())
    recorder = method.control("identity", 0, given)
    steps = denoise(
        model,
        run,
        Run((0,)),
        prompt_embeds=embeds,
        negative_embeds=model.encode_prompts([Prompt("")]),
        noise=noise,
        noise_seed=7,
        sampling=sampling_of("unipc", num_steps=2),
        control=recorder,
    )
    deque(steps, maxlen=0)

    timesteps = model.solver(sampling_of("unipc", num_steps=2), noise, 7).timesteps
    with torch.no_grad():
        pipeline.transformer(noise, timesteps[:1], embeds)
    query, key = (seen[norm].double().unflatten(2, (6, -1)).transpose(1, 2) for norm in seen)
    weights = (query @ key.mT * 12**-0.5).softmax(dim=-1)[0].mean(dim=0)
    background, character = (
        weights[:, list(tokens.rows[segment])].mean(dim=1)
        for segment in ("background", "character")
    )
    assert recorder.observation is not None
    actual = recorder.observation.foreground
    assert actual is not None
    torch.testing.assert_close(actual.score_N, (character - background).float(), rtol=0, atol=1e-6)


def test_what_attends_to_text_is_looked_at_once_per_site(model: VideoModel) -> None:
    seen: list[tuple[AttentionSite, tuple[int, ...], tuple[int, ...]]] = []

    class Watcher(AttentionControl):
        def cross(self, site: AttentionSite, query_BSHD: Tensor, key_BTHD: Tensor) -> None:
            seen.append((site, tuple(query_BSHD.shape), tuple(key_BTHD.shape)))

    embeds = model.encode_prompts([PROMPT, Prompt("")])
    steps = denoise(
        model,
        context_of(model),
        Run((0,)),
        prompt_embeds=embeds[:1],
        negative_embeds=embeds[1:],
        noise=model.initial_noise(7, VIDEO),
        noise_seed=7,
        sampling=sampling_of("euler", num_steps=1),
        control=Watcher(),
    )
    deque(steps, maxlen=0)
    assert seen == [
        (AttentionSite(0, layer, branch), (1, 72, 6, 12), (1, 16, 6, 12))
        for branch in ("cond", "uncond")
        for layer in range(3)
    ]
