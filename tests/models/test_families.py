"""Every behaviour that a model must have, for every family. What only one has: test_<family>.py.

What it is bitwise equal to is the stock pipeline; for its latents: tests/engine/test_sampling.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_families import (
    PROMPT,
    TINY_FAMILIES,
    VIDEO,
    TinyFamily,
    context_of,
    load_tiny,
    sampling_of,
)

from bachvid.attention.control import AttentionControl
from bachvid.attention.groups import ALONE
from bachvid.catalog.registry import load_facts
from bachvid.engine.sampling import denoise
from bachvid.errors import BachvidError, ConfigError, ModelSupportError
from bachvid.inputs.choices import Dtype, SchedulerName
from bachvid.inputs.sections import ModelConfig, ResolvedVideo
from bachvid.methods.base import Run
from bachvid.models.base import TextEncoder, VideoModel, attention_control
from bachvid.models.registry import load_model
from bachvid.prompts.compose import Prompt, compose_prompt
from bachvid.prompts.tokenizer import PromptTokenizer

OTHER = compose_prompt("a sunny beach", "a robot", "waves and walks")
WEIGHTS = "diffusion_pytorch_model.safetensors"


# --- what the model returns is what the stock pipeline returns ----------------------------------


@torch.no_grad()
def test_prompt_embeddings_are_bitwise_those_of_the_stock_pipeline(
    model: VideoModel, pipeline: DiffusionPipeline
) -> None:
    expected, negative = pipeline.encode_prompt(PROMPT.text, "", max_sequence_length=16)
    actual = model.encode_prompts([PROMPT, Prompt(""), PROMPT])
    torch.testing.assert_close(actual[:1], expected, rtol=0, atol=0)
    torch.testing.assert_close(actual[1:2], negative, rtol=0, atol=0)
    torch.testing.assert_close(actual[2:], expected, rtol=0, atol=0)


def test_an_embedding_does_not_depend_on_what_else_is_encoded(model: VideoModel) -> None:
    alone = model.encode_prompts([PROMPT])
    together = model.encode_prompts([OTHER, PROMPT, OTHER, PROMPT])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=0)
    torch.testing.assert_close(together[3:], alone, rtol=0, atol=0)
    assert not torch.equal(together[0], together[1])


def test_the_text_encoder_is_loaded_when_needed_and_can_be_freed(
    model: VideoModel, pipeline: DiffusionPipeline
) -> None:
    loads: list[TextEncoder] = []

    def load_text_encoder() -> TextEncoder:
        loads.append(TextEncoder(PromptTokenizer.load(model.facts), pipeline.text_encoder))
        return loads[-1]

    lazy = type(model)(
        model.facts,
        transformer=pipeline.transformer,
        vae=pipeline.vae,
        load_text_encoder=load_text_encoder,
        scheduler_config=pipeline.scheduler.config,
        device=model.device,
    )
    assert not loads
    expected = lazy.encode_prompts([PROMPT])
    lazy.encode_prompts([OTHER])
    assert len(loads) == 1
    lazy.free_text_encoder()
    torch.testing.assert_close(lazy.encode_prompts([PROMPT]), expected, rtol=0, atol=0)
    assert len(loads) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initial_noise_is_that_of_the_stock_pipeline(
    tiny: TinyFamily, folder: Path, pipeline: DiffusionPipeline, dtype: Dtype
) -> None:
    noise = load_tiny(folder, dtype).initial_noise(3, VIDEO)
    # Wan's latents are in fp32 also where its weights are not.
    assert noise.dtype == (torch.float32 if tiny.latent_axes == "BCFhw" else getattr(torch, dtype))
    generator = torch.Generator().manual_seed(3)
    size = (VIDEO.height, VIDEO.width, VIDEO.pixel_frames)
    if tiny.latent_axes == "BFChw":
        size = (VIDEO.pixel_frames, VIDEO.height, VIDEO.width)
    expected = pipeline.prepare_latents(1, 4, *size, noise.dtype, "cpu", generator)
    torch.testing.assert_close(noise, expected, rtol=0, atol=0)


def test_decoded_frames_are_the_pictures_of_the_stock_pipeline(
    tiny: TinyFamily, model: VideoModel, pipeline: DiffusionPipeline
) -> None:
    latents = model.initial_noise(1, VIDEO)
    actual = model.decode(latents)
    assert actual.shape == (5, 32, 48, 3)
    assert actual.dtype == np.uint8
    assert actual.std() > 1
    np.testing.assert_array_equal(actual, tiny.stock_pictures(pipeline, latents))


def test_encoded_latents_are_those_of_the_stock_autoencoder(
    tiny: TinyFamily, model: VideoModel, pipeline: DiffusionPipeline
) -> None:
    noise = model.initial_noise(1, VIDEO)
    frames = model.decode(noise)
    frames.setflags(write=False)  # as those that come out of Ray's store
    actual = model.encode(frames)
    expected = tiny.stock_encoded(pipeline, frames)
    assert actual.shape == noise.shape
    assert actual.dtype == noise.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    # The same scale as that of what is decoded.
    torch.testing.assert_close(model._scaled(model._unscaled(noise)), noise, rtol=0, atol=1e-5)


def test_only_large_videos_are_decoded_and_encoded_in_tiles(
    tiny: TinyFamily,
    model: VideoModel,
    pipeline: DiffusionPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    height, width = tiny.large
    traits = model.facts.traits
    decoder = replace(traits.decoder, tiled_from=height * width, tile=tiny.tile)
    changed = replace(model.facts, traits=replace(traits, decoder=decoder), max_grid=None)
    monkeypatch.setattr(model, "facts", changed)
    large = tiny.latents(height, width)
    small = large[..., :-2]
    pipeline.vae.enable_tiling(*tiny.tile)
    tiled = tiny.stock_pictures(pipeline, large)
    tiled_latents = tiny.stock_encoded(pipeline, tiled)
    pipeline.vae.disable_tiling()
    assert not np.array_equal(tiled, tiny.stock_pictures(pipeline, large))
    np.testing.assert_array_equal(model.decode(large), tiled)
    np.testing.assert_array_equal(model.decode(small), tiny.stock_pictures(pipeline, small))
    torch.testing.assert_close(model.encode(tiled), tiled_latents, rtol=0, atol=0)


def test_layout_and_rotary_are_those_of_the_video(tiny: TinyFamily, model: VideoModel) -> None:
    layout, rotary = model.layout(VIDEO), model.rotary(VIDEO)
    assert (layout.grid, layout.text_tokens) == ((3, 4, 6), tiny.joint_text_tokens)
    assert layout.joint_tokens == tiny.joint_text_tokens + 72
    assert rotary.is_none == (not model.facts.has_rope)
    if rotary.cos_ND is not None:
        assert rotary.cos_ND.shape == (72, model.facts.head_dim)
    assert model.rotary(VIDEO) is rotary


def test_an_illegal_size_is_refused(tiny: TinyFamily, model: VideoModel) -> None:
    height, message = tiny.illegal
    with pytest.raises(ConfigError, match=message):
        model.layout(ResolvedVideo(pixel_frames=5, height=height, width=48))
    with pytest.raises(ConfigError, match=message):
        model.encode(np.zeros((5, height, 48, 3), dtype=np.uint8))


def test_a_model_that_makes_videos_from_text_alone_refuses_a_conditioning(
    model: VideoModel,
) -> None:
    latents = model.initial_noise(1, VIDEO)
    embeds = model.encode_prompts([PROMPT])
    with pytest.raises(ModelSupportError, match="videos from text alone"):
        model.predict(latents, torch.tensor(999), embeds, conditioning=latents)


# --- processors ---------------------------------------------------------------------------------


def test_attention_control_reaches_every_layer_and_restores(
    tiny: TinyFamily, model: VideoModel
) -> None:
    original = model.transformer.attn_processors
    with attention_control(model, context_of(model), AttentionControl()):
        inside = model.transformer.attn_processors
    assert {path: (type(found).__name__, found.layer) for path, found in inside.items()} == {
        f"{tiny.blocks}.{layer}.{name}.processor": (processor, layer)
        for layer in range(3)
        for name, processor in tiny.processors.items()
    }
    assert model.transformer.attn_processors == original
    assert {type(found) for found in original.values()} == {tiny.stock_processor}


def test_attention_control_restores_after_an_exception(model: VideoModel) -> None:
    original = model.transformer.attn_processors
    with (
        pytest.raises(ZeroDivisionError),
        attention_control(model, context_of(model), AttentionControl()),
    ):
        _ = 1 / 0
    assert model.transformer.attn_processors == original


# --- solvers ------------------------------------------------------------------------------------


def predictions(model: VideoModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = model.initial_noise(1, VIDEO).shape
    return [torch.randn(shape, generator=generator) for _ in range(4)]


def test_a_solver_has_no_trace_of_another_run(model: VideoModel, scheduler: SchedulerName) -> None:
    noise = model.initial_noise(1, VIDEO)
    first, second = (model.solver(sampling_of(scheduler), noise, 1) for _ in range(2))
    ends = []
    for solver in (first, second):
        latents = noise
        for step, prediction in enumerate(predictions(model)):
            latents, _ = solver.advance(step, prediction, latents)
        ends.append(latents)
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_an_estimate_is_bitwise_that_of_the_step_and_changes_nothing(
    model: VideoModel, scheduler: SchedulerName
) -> None:
    noise = model.initial_noise(1, VIDEO)
    plain, asked = (model.solver(sampling_of(scheduler), noise, 1) for _ in range(2))
    latents = noise
    for step, prediction in enumerate(predictions(model)):
        estimate = asked.estimate(step, prediction, latents)
        asked.estimate(step, -prediction, latents)
        expected = plain.advance(step, prediction, latents)
        actual = asked.advance(step, prediction, latents)
        for found, wanted in zip((*actual, estimate), (*expected, expected[1]), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        latents = actual[0]


def test_noised_latents_are_those_of_the_scheduler(
    tiny: TinyFamily, model: VideoModel, pipeline: DiffusionPipeline, scheduler: SchedulerName
) -> None:
    stock = tiny.schedulers[scheduler](pipeline.scheduler.config)
    stock.set_timesteps(4)
    clean, noise = model.initial_noise(1, VIDEO), model.initial_noise(2, VIDEO)
    solver = model.solver(sampling_of(scheduler), noise, 1)
    torch.testing.assert_close(solver.timesteps, stock.timesteps, rtol=0, atol=0)
    for step, timestep in enumerate(stock.timesteps):
        if hasattr(stock, "add_noise"):
            expected = stock.add_noise(clean, noise, timestep[None])
        else:
            expected = stock.scale_noise(clean, timestep[None], noise)
        torch.testing.assert_close(solver.noised(clean, noise, step), expected, rtol=0, atol=0)


# --- weights that take turns on the device ------------------------------------------------------


def test_offload_changes_no_bit(folder: Path) -> None:
    """Encode, denoise, decode, and encode again: each component is used after the others."""
    found = []
    for offload in ("none", "model"):
        config = ModelConfig.model_validate({"id": str(folder), "offload": offload})
        model = load_model(config, load_facts(config), ALONE)
        embeds_PTC = model.encode_prompts([PROMPT, Prompt("")])
        model.free_text_encoder()
        steps = denoise(
            model,
            context_of(model),
            Run(tuple(range(2))),
            prompt_embeds=embeds_PTC[:1],
            negative_embeds=embeds_PTC[1:],
            noise=model.initial_noise(7, VIDEO),
            noise_seed=7,
            sampling=sampling_of(model.facts.schedulers[0], num_steps=2),
        )
        *_, last = steps
        frames = model.decode(last.latents)
        clean = model.encode(frames)
        assert torch.equal(model.encode_prompts([PROMPT]), embeds_PTC[:1])
        found.append((last.latents, torch.from_numpy(frames), clean))
        modules = (model.transformer, model.vae)
        hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in modules]
        if offload == "model":  # Accelerate's hooks are there, and each sends the other away
            assert hooks[0].prev_module_hook.model is model.vae
            assert hooks[1].prev_module_hook.model is model.transformer
        else:
            assert hooks == [None, None]
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(actual, expected)


# --- the published models, without their weights ------------------------------------------------

PUBLISHED: dict[str, tuple[dict[str, Any], float, tuple[int, int, int]]] = {
    "THUDM/CogVideoX-5b": (
        {
            "num_layers": 42,
            "num_attention_heads": 48,
            "use_rotary_positional_embeddings": True,
        },
        5.57,
        (13, 30, 45),
    ),
    "zai-org/CogVideoX-2b": ({"num_layers": 30, "num_attention_heads": 30}, 1.69, (13, 30, 45)),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960, "text_dim": 4096},
        1.42,
        (21, 30, 52),
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (
        {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824, "text_dim": 4096},
        14.29,
        (21, 30, 52),
    ),
}


def published_transformer(hub_id: str, **sizes: int) -> torch.nn.Module:
    """The real class at its real size, without memory."""
    facts = load_facts(ModelConfig(id=hub_id))
    transformer_class = TINY_FAMILIES[facts.family].transformer_class
    with torch.device("meta"):
        transformer: torch.nn.Module = transformer_class(**PUBLISHED[hub_id][0] | sizes)
    return transformer


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_facts_fit_the_published_transformer(hub_id: str) -> None:
    _, billions, grid = PUBLISHED[hub_id]
    transformer: Any = published_transformer(hub_id)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)
    facts = load_facts(ModelConfig(id=hub_id))
    tiny = TINY_FAMILIES[facts.family]
    assert list(transformer.attn_processors) == [
        f"{tiny.blocks}.{layer}.{name}.processor"
        for layer in range(facts.num_layers)
        for name in tiny.processors
    ]
    attention = transformer.get_submodule(f"{tiny.blocks}.0.attn1")
    config = transformer.config
    assert attention.heads == facts.num_heads
    assert attention.inner_dim == facts.num_heads * facts.head_dim
    assert config.attention_head_dim == facts.head_dim
    assert config.in_channels == facts.latent_channels == 16
    assert config.get("use_rotary_positional_embeddings", True) == facts.has_rope
    assert config.get("max_text_seq_length", 512) == facts.text_tokens
    assert config.get("text_embed_dim", 4096) == config.get("text_dim", 4096) == facts.text_dim
    assert config.patch_size in (facts.patch_size, (1, facts.patch_size, facts.patch_size))
    defaults = facts.defaults
    assert facts.grid(defaults.pixel_frames, defaults.height, defaults.width) == grid


def no_text_encoder() -> NoReturn:
    raise AssertionError("no prompt is encoded here")


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_the_adapter_runs_the_published_transformer_at_full_size(
    hub_id: str, request: pytest.FixtureRequest
) -> None:
    """Shapes only: nothing is computed on the meta device."""
    transformer: Any = published_transformer(hub_id, num_layers=2)
    facts = replace(load_facts(ModelConfig(id=hub_id)), num_layers=2)
    tiny_folder = request.getfixturevalue(TINY_FAMILIES[facts.family].fixture)
    model = type(load_tiny(tiny_folder))(
        facts,
        transformer=transformer,
        vae=None,
        load_text_encoder=no_text_encoder,
        scheduler_config={},
        device=transformer.device,
    )
    defaults = facts.defaults
    video = ResolvedVideo(
        pixel_frames=defaults.pixel_frames, height=defaults.height, width=defaults.width
    )
    context = context_of(model, video)
    context.branches = facts.passes[0]
    num_branches = len(context.branches)
    latents = torch.empty(model._latent_shape(context.layout.grid), device="meta")
    latents = latents.expand(num_branches, -1, -1, -1, -1)
    with attention_control(model, context, AttentionControl()):
        prediction = model.predict(
            latents,
            torch.tensor(999, device="meta"),
            torch.empty(num_branches, facts.text_tokens, facts.text_dim, device="meta"),
        )
    assert prediction.shape == latents.shape


# --- what cannot be loaded ----------------------------------------------------------------------


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


def shrink_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors[min(tensors)] = torch.zeros(3)
    save_file(tensors, path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rename(component: str, class_name: str) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / "model_index.json", **{component: ["library", class_name]}
    )


DAMAGE: dict[str, tuple[Callable[[Path], None], type[BachvidError], str]] = {
    "no transformer weights": (
        lambda f: (f / "transformer" / WEIGHTS).unlink(),
        ConfigError,
        "cannot load its transformer: .*no file named",
    ),
    "no VAE weights": (
        lambda f: (f / "vae" / WEIGHTS).unlink(),
        ConfigError,
        "cannot load its vae: .*no file named",
    ),
    "no scheduler": (
        lambda f: shutil.rmtree(f / "scheduler"),
        BachvidError,
        "cannot load its scheduler: .*no file named|scheduler_config.json: no such file",
    ),
    "weights cut short": (
        lambda f: cut_short(f / "transformer" / WEIGHTS),
        ConfigError,
        "cannot load its transformer: .*check that the download is complete",
    ),
    "a tensor is missing": (
        lambda f: drop_tensor(f / "transformer" / WEIGHTS),
        ConfigError,
        "the weights of its transformer lack 1 tensors .*do not belong to its config",
    ),
    "a tensor of another size": (
        lambda f: shrink_tensor(f / "vae" / WEIGHTS),
        ConfigError,
        "cannot load its vae: .*expected shape",
    ),
    "another transformer": (
        rename("transformer", "FluxTransformer2DModel"),
        ModelSupportError,
        "has a FluxTransformer2DModel as its transformer: the adapter for (cogvideox|wan) knows "
        "(CogVideoX|Wan)Transformer3DModel;",
    ),
    "another text encoder": (
        rename("text_encoder", "BertModel"),
        ModelSupportError,
        "has a BertModel as its text_encoder: .* knows (U?M?T5)EncoderModel;",
    ),
    "another VAE": (
        rename("vae", "AutoencoderKL"),
        ModelSupportError,
        "has a AutoencoderKL as its vae: .* knows AutoencoderKL(CogVideoX|Wan);",
    ),
    "another scheduler": (
        rename("scheduler", "DDPMScheduler"),
        ModelSupportError,
        "knows (CogVideoXDDIMScheduler and CogVideoXDPM|"
        "UniPCMultistepScheduler and FlowMatchEulerDiscrete)Scheduler;",
    ),
    "no VAE in the index": (
        lambda f: edit_json(f / "model_index.json", vae=None),
        ModelSupportError,
        "has a None as its vae",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_cannot_be_rendered_with_is_refused(
    folder: Path, tmp_path: Path, damage: str
) -> None:
    spoil, error, message = DAMAGE[damage]
    damaged = shutil.copytree(folder, tmp_path / "model")
    spoil(damaged)
    with pytest.raises(error, match=message):
        load_tiny(damaged)


@pytest.mark.parametrize("spoil", [drop_tensor, shrink_tensor, cut_short, Path.unlink])
def test_a_damaged_text_encoder_is_refused_when_it_is_needed(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    damaged = shutil.copytree(folder, tmp_path / "model")
    spoil(damaged / "text_encoder" / "model.safetensors")
    model = load_tiny(damaged)
    with pytest.raises(ConfigError, match="text_encoder"):
        model.encode_prompts([PROMPT])


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(folder, tmp_path / "model")
    weights = pickled / "transformer" / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ConfigError, match="must be a folder in diffusers format with safetensors"):
        load_tiny(pickled)


@pytest.mark.parametrize("hub_id", ["THUDM/CogVideoX-5b", "Wan-AI/Wan2.1-T2V-14B-Diffusers"])
def test_a_hub_model_that_cannot_be_had_is_refused(
    hub_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = ModelConfig(id=hub_id, revision="no-such-revision", device="cpu")
    with pytest.raises(ConfigError, match=rf"'{hub_id}': .*model_index.json.*revision"):
        load_model(config, load_facts(config), ALONE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_gpu_that_is_not_there_is_refused(folder: Path) -> None:
    config = ModelConfig(id=str(folder), device="cuda")
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        load_model(config, load_facts(config), ALONE)


def test_a_dtype_can_be_chosen(folder: Path) -> None:
    model = load_tiny(folder, "bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.encode_prompts([PROMPT]).dtype == torch.bfloat16
    held = model.facts.traits.components["vae"].dtype("bfloat16")
    assert model.vae.dtype == getattr(torch, held)


def test_a_family_without_an_adapter_is_refused(model: VideoModel) -> None:
    facts = replace(model.facts, traits=replace(model.facts.traits, name="pong"))
    with pytest.raises(
        ModelSupportError, match="family 'pong': bachvid has adapters for cogvideox"
    ):
        load_model(ModelConfig(id="pong"), facts, ALONE)
