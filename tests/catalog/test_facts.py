"""Model facts: what the published models and folders are said to be."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from json_models import STORYBOOK, VOCABULARY, write_json_model, write_json_wan

from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.profiles import flow_level, share_done
from bachvid.catalog.registry import load_facts, published_models
from bachvid.errors import BachvidError, ConfigError, ModelSupportError
from bachvid.inputs.sections import ModelConfig, ResolvedVideo

PUBLISHED = published_models()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_json_model(tmp_path / "small", with_vocabulary=True)


@pytest.fixture
def wan_folder(tmp_path: Path) -> Path:
    return write_json_wan(tmp_path / "wan")


def load(model_id: str | Path) -> ModelFacts:
    return load_facts(ModelConfig(id=str(model_id)))


@pytest.mark.parametrize("owner", ["THUDM", "zai-org"])
def test_cogvideox_5b_is_known_without_the_network(owner: str) -> None:
    facts = load(f"{owner}/CogVideoX-5b")
    assert (facts.num_layers, facts.num_heads, facts.head_dim) == (42, 48, 64)
    assert (facts.text_tokens, facts.text_dim, facts.has_rope) == (226, 4096, True)
    assert facts.grid(49, 480, 720) == (13, 30, 45)
    assert facts.defaults.dtype == "bfloat16"
    assert facts.folder is None


@pytest.mark.parametrize("owner", ["THUDM", "zai-org"])
def test_cogvideox_2b_is_known_without_the_network(owner: str) -> None:
    facts = load(f"{owner}/CogVideoX-2b")
    assert (facts.num_layers, facts.num_heads, facts.head_dim) == (30, 30, 64)
    assert (facts.text_tokens, facts.has_rope, facts.defaults.dtype) == (226, False, "float16")
    assert facts.grid(49, 480, 720) == (13, 30, 45)


def test_the_layers_of_the_5b_are_those_published_counted_from_0() -> None:
    published_vital = [1, 2, 12, 13, 14, 15, 16, 18, 20, 21, 22, 24, 30, 35, 42]
    attention = PUBLISHED["THUDM/CogVideoX-5b"].attention
    assert attention.vital_layers == tuple(layer - 1 for layer in published_vital)
    assert attention.mask_layers == tuple(range(5, 20))
    assert attention.match_layers == tuple(range(1, 16))
    assert attention.mask_words == "all"


@pytest.mark.parametrize(("size", "layers", "heads"), [("1.3B", 30, 12), ("14B", 40, 40)])
def test_wan_is_known_without_the_network(size: str, layers: int, heads: int) -> None:
    facts = load(f"Wan-AI/Wan2.1-T2V-{size}-Diffusers")
    assert (facts.num_layers, facts.num_heads, facts.head_dim) == (layers, heads, 128)
    assert (facts.text_tokens, facts.joint_text_tokens, facts.text_dim) == (512, 0, 4096)
    assert facts.grid(81, 480, 832) == (21, 30, 52)
    assert (
        facts.layout(ResolvedVideo(pixel_frames=81, height=720, width=1280)).joint_tokens == 75600
    )
    defaults = facts.defaults
    assert (defaults.pixel_frames, defaults.height, defaults.width) == (81, 480, 832)
    assert (defaults.fps, defaults.num_steps, defaults.guidance_scale) == (16, 50, 5.0)
    assert (defaults.scheduler, defaults.dtype) == ("unipc", "bfloat16")
    assert facts.schedulers == ("unipc", "euler")
    assert facts.passes == (("cond",), ("uncond",))


def test_the_layers_of_wan_14b_are_those_published_counted_from_0() -> None:
    published_vital = [1, 2, 17, 22, 24, 29, 33, 34, 35, 39, 40]
    facts = PUBLISHED["Wan-AI/Wan2.1-T2V-14B-Diffusers"]
    assert facts.attention.vital_layers == tuple(layer - 1 for layer in published_vital)
    assert facts.attention.mask_layers == tuple(range(2, 10))
    assert facts.attention.match_layers == tuple(range(1, 7))
    assert facts.step_at(facts.attention.mask_level, 50) == 9
    assert facts.step_at(facts.attention.inject_levels["paper"], 50) == 26
    assert facts.attention.mask_words == "nouns"


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("done", [0.0, 0.1, 0.48, 0.9])
def test_a_level_is_the_noise_that_is_gone(done: float, shift: float) -> None:
    left = 1 - done
    sigma = shift * left / (1 + (shift - 1) * left)  # as diffusers shifts its schedules
    assert flow_level(done, shift) == pytest.approx(1 - sigma)
    assert share_done(flow_level(done, shift), shift) == pytest.approx(done)


def test_a_level_comes_later_in_a_schedule_that_is_shifted_more(tmp_path: Path) -> None:
    facts = load(write_json_wan(tmp_path))  # its shift is 5; levels are of the published 3
    assert facts.flow_shift == 5.0
    steps = [replace(facts, flow_shift=shift).step_at(0.3, 1000) for shift in (1.0, 3.0, 5.0)]
    assert steps == [300, 562, 682]


@pytest.mark.parametrize("model_id", sorted(PUBLISHED))
def test_every_layer_of_a_model_exists(model_id: str) -> None:
    facts = load(model_id)
    of = facts.attention
    for layers in (of.vital_layers, of.mask_layers, of.match_layers):
        assert layers == tuple(sorted(set(layers)))
        assert 0 <= layers[0] <= layers[-1] < facts.num_layers


def test_the_2b_takes_layers_from_first_to_last() -> None:
    layers = load("THUDM/CogVideoX-2b").attention.vital_layers
    assert (layers[0], layers[-1]) == (0, 29)


def test_a_folder_is_read_from_its_json_files(folder: Path) -> None:
    facts = load(folder)
    assert (facts.name, facts.folder) == ("small", folder)
    assert (facts.num_layers, facts.num_heads, facts.head_dim) == (8, 4, 32)
    assert (facts.spatial_ratio, facts.temporal_ratio, facts.latent_channels) == (4, 2, 12)
    assert facts.grid(5, 48, 48) == (3, 12, 12)
    assert facts.vocabulary is not None
    assert facts.vocabulary.action == tuple(VOCABULARY["action"])
    assert facts.attention.inject_levels == {"paper": 0.52, "fast": 1.0}


def test_a_folder_without_layers_takes_those_of_the_paper_at_its_depth(tmp_path: Path) -> None:
    facts = load(write_json_model(tmp_path, with_vocabulary=False))
    assert facts.vocabulary is None
    assert facts.attention.vital_layers == (0, 2, 3, 4, 5, 6, 7)
    assert facts.attention.mask_layers == (1, 2, 3)
    assert (facts.defaults.pixel_frames, facts.defaults.height) == (5, 48)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((6, 48, 48), "video.pixel_frames: is 6: must be 1 more than a multiple of 2"),
        ((5, 52, 48), "video.height: is 52: must be a multiple of 8; nearest are 48 and 56"),
        ((5, 48, 4), "video.width: is 4: must be a multiple of 8; nearest are 8"),
    ],
)
def test_an_illegal_size_is_refused_with_the_nearest_legal_ones(
    folder: Path, size: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(folder).grid(*size)


def test_each_nearest_size_is_legal() -> None:
    facts = load("THUDM/CogVideoX-5b")
    with pytest.raises(ConfigError) as caught:
        facts.grid(50, 480, 720)
    nearest = [int(n) for n in re.findall(r"\d+", str(caught.value).partition("nearest")[2])]
    assert nearest == [49, 53]
    for pixel_frames in nearest:
        facts.grid(pixel_frames, 480, 720)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model_index.json", {"_class_name": "LTXPipeline"}, "is a LTXPipeline"),
        ("transformer/config.json", {"patch_size_t": 2}, "so it is a CogVideoX 1.5"),
        ("transformer/config.json", {"in_channels": 24}, "its components do not fit"),
        ("text_encoder/config.json", {"d_model": 8}, "its components do not fit"),
        ("transformer/config.json", {"num_layers": 0}, "num_layers: is 0: must be >= 1"),
        ("vae/config.json", {"block_out_channels": 3}, "block_out_channels: is 3: must be a list"),
        ("storybook.json", {"attention": 3}, "attention: is 3: "),
    ],
)
def test_a_folder_that_is_not_our_model_is_refused(
    folder: Path, name: str, change: dict[str, object], message: str
) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelSupportError, match=re.escape(message)):
        load(folder)


def test_a_wan_folder_is_read_from_its_json_files(wan_folder: Path) -> None:
    facts = load(wan_folder)
    assert (facts.family, facts.name, facts.folder) == ("wan", "wan", wan_folder)
    assert (facts.num_layers, facts.num_heads, facts.head_dim) == (8, 4, 32)
    assert (facts.spatial_ratio, facts.temporal_ratio, facts.latent_channels) == (4, 2, 12)
    assert facts.grid(5, 48, 48) == (3, 6, 6)
    assert (facts.text_tokens, facts.defaults.dtype) == (512, "float32")
    assert facts.attention.mask_layers == (0, 1, 2)


def test_a_video_with_more_tokens_than_positions_is_refused(wan_folder: Path) -> None:
    path = wan_folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_max_seq_len": 6}))
    facts = load(wan_folder)
    assert facts.grid(11, 48, 48) == (6, 6, 6)
    for size, name in (((13, 48, 48), "pixel_frames"), ((5, 64, 48), "height")):
        with pytest.raises(ConfigError, match=rf"^video\.{name}: makes [78] tokens .* for 6;"):
            facts.grid(*size)


def test_a_wan_folder_can_say_how_long_its_prompts_are(wan_folder: Path) -> None:
    (wan_folder / "storybook.json").write_text(json.dumps({**STORYBOOK, "text_tokens": 20}))
    facts = load(wan_folder)
    assert (facts.text_tokens, facts.joint_text_tokens) == (20, 0)
    assert facts.vocabulary is not None
    assert facts.attention.mask_words == "all"


def test_only_a_wan_folder_can_say_how_long_its_prompts_are(folder: Path) -> None:
    (folder / "storybook.json").write_text(json.dumps({**STORYBOOK, "text_tokens": 30}))
    with pytest.raises(ModelSupportError, match=r"text_tokens: is 30: .*says it, 20"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "model_index.json",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "has a transformer_2, so it is a Wan2.2 14B",
        ),
        ("model_index.json", {"boundary_ratio": 0.875}, "has boundary_ratio 0.875, so it is"),
        ("model_index.json", {"expand_timesteps": True}, "has expand_timesteps, so it is a Wan2.2"),
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, "is a WanVACEPipeline: only"),
        (
            "model_index.json",
            {"_class_name": "WanImageToVideoPipeline"},
            "is a WanImageToVideoPipeline: only CogVideoXPipeline and WanPipeline, which make "
            "videos from text, are supported",
        ),
        (
            "transformer/config.json",
            {"image_dim": 1280},
            "has image_dim 1280, so it also takes an image: only Wan2.1 from text is supported; "
            "use Wan-AI/Wan2.1-T2V-1.3B-Diffusers or Wan-AI/Wan2.1-T2V-14B-Diffusers",
        ),
        ("transformer/config.json", {"added_kv_proj_dim": 64}, "has added_kv_proj_dim 64"),
        ("vae/config.json", {"is_residual": True}, "has a VAE with is_residual, so it is a Wan2.2"),
        ("vae/config.json", {"patch_size": 2}, "has a VAE with patch_size 2, so it is a Wan2.2"),
        ("transformer/config.json", {"patch_size": [2, 2, 2]}, "has patch_size [2, 2, 2]: a token"),
        ("transformer/config.json", {"patch_size": [1, 2, 1]}, "has patch_size [1, 2, 1]: a token"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size: is 2: must be a list"),
        ("vae/config.json", {"dim_mult": [1, 2]}, "its VAE makes pixels 2 and frames 2 times"),
        ("vae/config.json", {"scale_factor_temporal": 4}, "its scale_factor_temporal 4: correct"),
        ("transformer/config.json", {"in_channels": 24}, "its components do not fit"),
        ("text_encoder/config.json", {"d_model": 8}, "its components do not fit"),
    ],
)
def test_a_wan_folder_that_is_not_our_model_is_refused_by_name(
    wan_folder: Path, name: str, change: dict[str, object], message: str
) -> None:
    path = wan_folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelSupportError, match=re.escape(message)):
        load(wan_folder)


@pytest.mark.parametrize("content", [None, "{", "[]", "\x00", "[" * 10_000])
def test_a_damaged_folder_is_refused(folder: Path, content: str | None) -> None:
    path = folder / "vae" / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ModelSupportError, match=re.escape(str(path))):
        load(folder)


@pytest.mark.parametrize("model_id", ["no such model", "a/b/c", "/nowhere", "..", "THUDM"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(
    model_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BachvidError):
        load(model_id)
