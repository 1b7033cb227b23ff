from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.attention.control import AttentionControl
from bachvid.catalog.registry import load_facts
from bachvid.errors import BachvidError, ConfigError, ModelSupportError
from bachvid.inputs.sections import ModelConfig, VideoConfig
from bachvid.models import cogvideox
from bachvid.models.base import VideoModel, attention_control
from bachvid.models.cogvideox import CogVideoXControlledProcessor, CogVideoXModel
from bachvid.models.loading import TextEncoder
from bachvid.models.registry import load_model
from bachvid.prompts.compose import Prompt, compose_prompt
from bachvid.prompts.tokenizer import PromptTokenizer

PROMPT = compose_prompt("a snowy forest", "a girl in a yellow dress", "jumps")
OTHER = compose_prompt("a sunny beach", "a robot", "waves and walks")
VIDEO = VideoConfig(pixel_frames=5, height=32, width=48)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(folder: Path, *, dtype: str | None = None) -> VideoModel:
    config = ModelConfig(id=str(folder), device="cpu", dtype=dtype)
    return load_model(config, load_facts(config))


@pytest.fixture(scope="module")
def model(tiny_cogvideox_folder: Path) -> VideoModel:
    return load(tiny_cogvideox_folder)


@pytest.fixture(scope="module")
def pipeline(tiny_cogvideox_folder: Path) -> CogVideoXPipeline:
    return CogVideoXPipeline.from_pretrained(tiny_cogvideox_folder)


# --- what the model gives is what the stock pipeline gives --------------------------------------


@torch.no_grad()
def test_prompt_embeddings_are_bitwise_those_of_the_stock_pipeline(
    model: VideoModel, pipeline: CogVideoXPipeline
) -> None:
    expected, negative = pipeline.encode_prompt(PROMPT.text, "", max_sequence_length=16)
    actual = model.encode_prompts([PROMPT, Prompt("", ())])
    torch.testing.assert_close(actual[:1], expected, rtol=0, atol=0)
    torch.testing.assert_close(actual[1:], negative, rtol=0, atol=0)


def test_an_embedding_does_not_depend_on_what_else_is_encoded(model: VideoModel) -> None:
    alone = model.encode_prompts([PROMPT])
    together = model.encode_prompts([OTHER, PROMPT, OTHER, PROMPT])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=0)
    torch.testing.assert_close(together[3:], alone, rtol=0, atol=0)
    assert not torch.equal(together[0], together[1])


def test_the_text_encoder_is_loaded_when_needed_and_can_be_freed(
    model: VideoModel, pipeline: CogVideoXPipeline
) -> None:
    loads: list[TextEncoder] = []

    def load_text_encoder() -> TextEncoder:
        loads.append(TextEncoder(PromptTokenizer.load(model.facts), pipeline.text_encoder))
        return loads[-1]

    lazy = CogVideoXModel(
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


def test_initial_noise_is_that_of_the_stock_pipeline(
    model: VideoModel, pipeline: CogVideoXPipeline
) -> None:
    generator = torch.Generator().manual_seed(3)
    expected = pipeline.prepare_latents(
        1, 4, VIDEO.pixel_frames, VIDEO.height, VIDEO.width, torch.float32, "cpu", generator
    )
    torch.testing.assert_close(model.initial_noise(3, VIDEO), expected, rtol=0, atol=0)


def stock_pictures(pipeline: CogVideoXPipeline, latents: Tensor) -> NDArray[np.uint8]:
    with torch.no_grad():
        video = pipeline.decode_latents(latents)
    pictures = pipeline.video_processor.postprocess_video(video, output_type="pil")[0]
    return np.stack([np.asarray(picture) for picture in pictures])


def test_decoded_frames_are_the_pictures_of_the_stock_pipeline(
    model: VideoModel, pipeline: CogVideoXPipeline
) -> None:
    latents = model.initial_noise(1, VIDEO)
    actual = model.decode(latents)
    assert actual.shape == (5, 32, 48, 3)
    assert actual.dtype == np.uint8
    assert actual.std() > 1
    np.testing.assert_array_equal(actual, stock_pictures(pipeline, latents))


def test_only_large_videos_are_decoded_in_tiles(
    model: VideoModel, pipeline: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cogvideox, "TILED_FROM_PIXELS", 32 * 48)
    monkeypatch.setattr(cogvideox, "TILE_HEIGHT", 24)
    monkeypatch.setattr(cogvideox, "TILE_WIDTH", 20)
    large = model.initial_noise(1, VIDEO)
    small = large[:, :, :, :-2]
    pipeline.vae.enable_tiling(24, 20)
    tiled = stock_pictures(pipeline, large)
    pipeline.vae.disable_tiling()
    assert not np.array_equal(tiled, stock_pictures(pipeline, large))
    np.testing.assert_array_equal(model.decode(large), tiled)
    np.testing.assert_array_equal(model.decode(small), stock_pictures(pipeline, small))


def test_layout_and_rotary_are_those_of_the_video(model: VideoModel) -> None:
    layout = model.layout(VIDEO)
    rotary = model.rotary(VIDEO)
    assert layout.grid == (3, 4, 6)
    assert layout.joint_tokens == 16 + 72
    assert rotary.cos_ND.shape == (72, 16)


def test_a_model_without_rope_has_no_rotary(tiny_cogvideox_2b_folder: Path) -> None:
    assert load(tiny_cogvideox_2b_folder).rotary(VIDEO).is_none


def test_an_illegal_size_is_refused(model: VideoModel) -> None:
    with pytest.raises(ConfigError, match="nearest are 32 and 40"):
        model.layout(VideoConfig(pixel_frames=5, height=36, width=48))


def test_a_scheduler_is_fresh_each_time(model: VideoModel) -> None:
    first, second = model.scheduler("dpm"), model.scheduler("dpm")
    first.set_timesteps(3, device=model.device)
    assert len(second.timesteps) == 1000


# --- processors ---------------------------------------------------------------------------------


def test_attention_control_reaches_every_layer_and_restores(model: VideoModel) -> None:
    run = RunContext(layout=model.layout(VIDEO), rotary=model.rotary(VIDEO))
    original = model.transformer.attn_processors
    with attention_control(model, run, AttentionControl()):
        inside = model.transformer.attn_processors
    assert [type(p) for p in inside.values()] == [CogVideoXControlledProcessor] * 3
    assert [p.layer for p in inside.values()] == [0, 1, 2]
    assert model.transformer.attn_processors == original
    assert {type(p) for p in original.values()} == {CogVideoXAttnProcessor2_0}


def test_attention_control_restores_after_an_exception(model: VideoModel) -> None:
    run = RunContext(layout=model.layout(VIDEO), rotary=model.rotary(VIDEO))
    original = model.transformer.attn_processors
    with pytest.raises(ZeroDivisionError), attention_control(model, run, AttentionControl()):
        _ = 1 / 0
    assert model.transformer.attn_processors == original


# --- the published models, without their weights ------------------------------------------------

PUBLISHED = {
    "THUDM/CogVideoX-5b": {
        "num_layers": 42,
        "num_attention_heads": 48,
        "use_rotary_positional_embeddings": True,
    },
    "zai-org/CogVideoX-2b": {
        "num_layers": 30,
        "num_attention_heads": 30,
        "use_rotary_positional_embeddings": False,
    },
}


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_facts_fit_the_published_transformer(hub_id: str) -> None:
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**PUBLISHED[hub_id])
    facts = load_facts(ModelConfig(id=hub_id))
    paths = list(transformer.attn_processors)
    assert paths == [f"transformer_blocks.{i}.attn1.processor" for i in range(facts.num_layers)]
    attention = transformer.transformer_blocks[0].attn1
    assert attention.heads == facts.num_heads
    assert attention.inner_dim == facts.num_heads * facts.head_dim
    config = transformer.config
    assert config.attention_head_dim == facts.head_dim == 64
    assert config.use_rotary_positional_embeddings == facts.has_rope
    assert config.max_text_seq_length == facts.text_tokens == 226
    assert config.text_embed_dim == facts.text_dim == 4096
    assert config.in_channels == facts.latent_channels
    assert config.patch_size == facts.patch_size
    for profile in facts.profiles.values():
        layers = {*profile.vital_layers, *profile.mask_layers, *profile.match_layers}
        assert layers <= set(range(len(paths)))
    defaults = facts.defaults
    grid = facts.grid(defaults.pixel_frames, defaults.height, defaults.width)
    assert grid == (13, 30, 45)
    assert 13 * 30 * 45 == 17550


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_the_adapter_runs_the_published_transformer_at_full_size(hub_id: str) -> None:
    """Shapes only: nothing is computed on the meta device."""
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**PUBLISHED[hub_id] | {"num_layers": 2})
    facts = replace(load_facts(ModelConfig(id=hub_id)), num_layers=2)
    model = CogVideoXModel(
        facts,
        transformer=transformer,
        vae=None,
        load_text_encoder=lambda: None,
        scheduler_config={},
        device=transformer.device,
    )
    video = VideoConfig(pixel_frames=49, height=480, width=720)
    run = RunContext(layout=model.layout(video), rotary=model.rotary(video))
    assert run.layout.joint_tokens == 17776
    latents = torch.empty(2, 13, 16, 60, 90, device="meta")
    with attention_control(model, run, AttentionControl()):
        prediction = model.predict(
            latents,
            torch.tensor(999, device="meta"),
            torch.empty(2, 226, 4096, device="meta"),
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
        ConfigError,
        "cannot load its scheduler: .*no file named",
    ),
    "weights cut short": (
        lambda f: cut_short(f / "transformer" / WEIGHTS),
        ConfigError,
        "cannot load its transformer: .*check that the download is complete",
    ),
    "a tensor is missing": (
        lambda f: drop_tensor(f / "transformer" / WEIGHTS),
        ConfigError,
        "the weights of its transformer lack 1 tensors .*norm_final.bias",
    ),
    "a tensor of another size": (
        lambda f: shrink_tensor(f / "vae" / WEIGHTS),
        ConfigError,
        "cannot load its vae: .*expected shape",
    ),
    "another text encoder class": (
        lambda f: edit_json(f / "model_index.json", text_encoder=["transformers", "BertModel"]),
        ModelSupportError,
        "has a BertModel as its text_encoder: .*T5EncoderModel",
    ),
    "another scheduler class": (
        lambda f: edit_json(f / "model_index.json", scheduler=["diffusers", "DDPMScheduler"]),
        ModelSupportError,
        "has a DDPMScheduler as its scheduler: .*CogVideoXDDIMScheduler and CogVideoXDPMScheduler",
    ),
    "no VAE in the index": (
        lambda f: edit_json(f / "model_index.json", vae=None),
        ModelSupportError,
        "has a None as its vae",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_cannot_be_rendered_with_is_refused(
    tiny_cogvideox_folder: Path, tmp_path: Path, damage: str
) -> None:
    spoil, error, message = DAMAGE[damage]
    folder = shutil.copytree(tiny_cogvideox_folder, tmp_path / "model")
    spoil(folder)
    with pytest.raises(error, match=message):
        load(folder)


@pytest.mark.parametrize("spoil", [drop_tensor, shrink_tensor, cut_short, Path.unlink])
def test_a_damaged_text_encoder_is_refused_when_it_is_needed(
    tiny_cogvideox_folder: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(tiny_cogvideox_folder, tmp_path / "model")
    spoil(folder / "text_encoder" / "model.safetensors")
    model = load(folder)
    with pytest.raises(ConfigError, match="text_encoder"):
        model.encode_prompts([PROMPT])


def test_pickled_weights_are_not_read(tiny_cogvideox_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_cogvideox_folder, tmp_path / "model")
    weights = folder / "transformer" / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ConfigError, match="must be a folder in diffusers format with safetensors"):
        load(folder)


def test_a_hub_model_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = ModelConfig(id="THUDM/CogVideoX-5b", revision="no-such-revision", device="cpu")
    with pytest.raises(ConfigError, match=r"'THUDM/CogVideoX-5b': .*model_index.json.*revision"):
        load_model(config, load_facts(config))


def test_a_family_without_an_adapter_is_refused(model: VideoModel) -> None:
    facts = replace(model.facts, family="pong")
    with pytest.raises(
        ModelSupportError, match="family 'pong': bachvid has adapters for cogvideox"
    ):
        load_model(ModelConfig(id="pong"), facts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_gpu_that_is_not_there_is_refused(tiny_cogvideox_folder: Path) -> None:
    config = ModelConfig(id=str(tiny_cogvideox_folder), device="cuda")
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        load_model(config, load_facts(config))


def test_a_dtype_can_be_chosen(tiny_cogvideox_folder: Path) -> None:
    model = load(tiny_cogvideox_folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.encode_prompts([PROMPT]).dtype == torch.bfloat16
    assert model.initial_noise(0, VIDEO).dtype == torch.bfloat16
