"""The plan: what it counts, what it prints, and what it does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import GOOD_STORY
from json_models import write_json_model, write_json_wan

from bachvid.errors import ConfigError, ModelSupportError
from bachvid.inputs.story import Story
from bachvid.methods.masking import ResolvedMaskConfig
from bachvid.planning.config import RenderConfig
from bachvid.planning.nodes import ClusterFacts, NodeFacts
from bachvid.planning.plan import RenderPlan, render_plan
from bachvid.planning.text import plan_json, plan_text


@pytest.fixture
def story(tmp_path: Path) -> Story:
    path = tmp_path / "story.yaml"
    path.write_text(GOOD_STORY)
    return Story.load(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_json_model(tmp_path / "model", with_vocabulary=True)


def plan_with(story: Story, model: Path | str, *overrides: str) -> RenderPlan:
    return render_plan(story, RenderConfig.from_yaml(None, [f"model.id={model}", *overrides]))


def test_a_scene_is_its_identity_video_and_then_its_actions(story: Story, folder: Path) -> None:
    (scene,) = plan_with(story, folder).scenes
    assert [video.id for video in scene.videos] == ["identity", "stands-still", "jumps"]
    assert scene.identity.action is None
    assert scene.identity.prompt.text == "a desert, a green robot, stands still"
    assert scene.frames[1].tokens is not None
    assert scene.frames[1].tokens.rows["action"] == (7,)


def test_the_noise_policy_decides_the_seeds(story: Story, folder: Path) -> None:
    for noise, num_seeds in (("same", 1), ("independent", 3)):
        (scene,) = plan_with(story, folder, f"sampling.noise={noise}").scenes
        assert len({video.seed for video in scene.videos}) == num_seeds


def test_the_cache_of_the_5b_has_the_bytes_of_the_notes(story: Story) -> None:
    # 215.65 MB of keys and values for a layer, step and branch; 15 layers, 26 steps, 2 branches.
    plan = plan_with(story, "THUDM/CogVideoX-5b", "method.profile=paper")
    assert plan.cache_bytes == 17_550 * 48 * 64 * 2 * 2 * 15 * 26 * 2
    assert plan.layout.video_tokens == 17_550
    assert plan.layout.joint_tokens == 17_776


@pytest.mark.parametrize(
    ("override", "factor"),
    [
        ("method.branches=cond", 1 / 2),
        ("method.vital_layers=[0, 1]", 2 / 8),
        ("method.inject_steps=[0, 26]", 2),
        ("model.dtype=bfloat16", 1 / 2),
        ("video.height=96", 2),
    ],
)
def test_the_cache_scales_with_what_is_kept(
    story: Story, folder: Path, override: str, factor: float
) -> None:
    steps = ("sampling.num_steps=26", "method.inject_steps=[0, 13]", "method.mask_step=10")
    both = ("method.profile=paper", *steps)
    base = plan_with(story, folder, *both).cache_bytes
    assert base == 432 * 4 * 32 * 2 * 4 * 8 * 13 * 2
    assert plan_with(story, folder, *both, override).cache_bytes == base * factor
    assert plan_with(story, folder, "method.name=none").cache_bytes == 0


def test_forwards_are_counted_with_the_pre_passes(story: Story, folder: Path) -> None:
    plan = plan_with(story, folder)  # 25 steps, the mask at step 10, two pre-passes
    assert plan.num_forwards == 25 + 2 * (2 * 11 + 25)
    assert plan.seconds == pytest.approx(0.05 * plan.num_forwards)
    assert plan_with(story, folder, "method.name=none").num_forwards == 3 * 25


def test_guidance_in_two_forwards_is_counted_twice(story: Story, tmp_path: Path) -> None:
    model, alone = write_json_wan(tmp_path / "wan"), "method.name=none"
    assert plan_with(story, model, alone).num_forwards == 2 * 3 * 50
    assert plan_with(story, model, alone, "sampling.guidance_scale=1").num_forwards == 3 * 50


def test_a_size_that_nobody_measured_has_no_time(story: Story, folder: Path) -> None:
    assert plan_with(story, folder, "video.height=96").seconds is None


def test_words_are_taken_as_the_vocabulary_spells_them(story: Story, folder: Path) -> None:
    (scene,) = story.scenes
    loud = scene.model_copy(update={"background": "A DESERT"})
    loud_story = story.model_copy(update={"scenes": (loud,)})
    assert plan_with(loud_story, folder).story == story


def test_a_model_without_rotary_positions_gets_a_warning(story: Story) -> None:
    notes = plan_with(story, "THUDM/CogVideoX-2b").notes
    assert any("no rotary positions" in note for note in notes)
    notes = plan_with(story, "THUDM/CogVideoX-2b", "method.name=none").notes
    assert not any("no rotary positions" in note for note in notes)


def test_a_hub_model_without_its_tokenizer_is_planned_without_tokens(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    plan = plan_with(story, "THUDM/CogVideoX-5b")
    assert plan.scenes[0].identity.tokens is None
    assert any("is not on this machine yet" in note for note in plan.notes)
    assert "tokens not counted" in plan_text(plan)


def test_a_folder_without_its_tokenizer_is_refused(story: Story, folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ModelSupportError, match="tokenizer"):
        plan_with(story, folder)


def test_the_source_is_named_in_a_problem_of_the_story(story: Story, folder: Path) -> None:
    (scene,) = story.scenes
    wrong = story.model_copy(update={"scenes": (scene.model_copy(update={"character": "Bob"}),)})
    config = RenderConfig.from_yaml(None, [f"model.id={folder}"])
    with pytest.raises(ConfigError, match=r"^day\.yaml: scenes\[0\]\.character: is 'Bob'"):
        render_plan(wrong, config, source="day.yaml")


def test_a_negative_prompt_is_a_phrase_or_nothing(story: Story, folder: Path) -> None:
    plan_with(story, folder, "sampling.negative_prompt=a snowy forest")
    with pytest.raises(ConfigError, match="negative_prompt"):
        plan_with(story, folder, "sampling.negative_prompt=blurry")


def test_the_text_names_all_that_is_decided(story: Story, folder: Path) -> None:
    assert plan_text(plan_with(story, folder)).splitlines()[:6] == [
        '"A day": 1 scene, 3 videos',
        "",
        "scene coast",
        "  identity: a desert, a green robot, stands still",
        "    seed 2366639056, 10 of 20 tokens: background 0-1, character 3-5, action 7-8",
        "  stands-still: a desert, a green robot, stands still",
    ]


def test_the_json_is_json_and_agrees_with_the_plan(story: Story, folder: Path) -> None:
    plan = plan_with(story, folder)
    data = json.loads(json.dumps(plan_json(plan)))
    assert data["cache_bytes"] == plan.cache_bytes
    assert data["config"]["method"]["mask_step"] == 10
    assert data["scenes"][0]["videos"][2] == {
        "id": "jumps",
        "prompt": "a desert, a green robot, jumps",
        "seed": plan.scenes[0].frames[1].seed,
        "tokens": 9,
        "spans": {"background": [0, 1], "character": [3, 4, 5], "action": [7]},
    }


def test_the_words_that_make_masks_are_shown(story: Story, folder: Path, tmp_path: Path) -> None:
    model = write_json_wan(tmp_path / "wan")
    plan = plan_with(story, model)
    assert isinstance(plan.config.method, ResolvedMaskConfig)
    assert plan.config.method.mask_words == "nouns"
    assert (plan.layout.text_tokens, plan.layout.grid) == (0, (41, 60, 104))
    lines = plan_text(plan).splitlines()
    assert lines[3] == "  masks by green, robot against desert"
    assert "10 of 512 tokens: background 1, character 4-5, action 7-8" in lines[5]
    data: Any = plan_json(plan)["scenes"][0]  # type: ignore[index]
    assert data["mask_words"] == {"character": ["green", "robot"], "background": ["desert"]}

    nouns = {"character": ["robot"]}
    named = {**story.model_dump(), "scenes": [{**story.scenes[0].model_dump(), "nouns": nouns}]}
    story = Story.model_validate(named)
    plan = plan_with(story, model)
    assert plan_text(plan).splitlines()[3] == "  masks by robot against desert"
    assert not any("nouns" in note for note in plan.notes)
    assert plan.scenes[0].frames[0].tokens is not None
    assert plan.scenes[0].frames[0].tokens.rows["character"] == (5,)

    plan = plan_with(story, folder)  # a CogVideoX: whole segments
    assert "masks by" not in plan_text(plan)
    assert any("the story's nouns are not used" in note for note in plan.notes)


def test_a_part_of_function_words_only_is_refused(story: Story, tmp_path: Path) -> None:
    (scene,) = story.scenes
    scene = scene.model_copy(update={"background": "there", "character": "her"})
    story, model = story.model_copy(update={"scenes": (scene,)}), write_json_wan(tmp_path / "wan")
    with pytest.raises(ConfigError) as caught:
        plan_with(story, model)
    assert [line.partition(": none")[0] for line in str(caught.value).splitlines()] == [
        "story: scenes[0].background: is 'there'",
        "story: scenes[0].character: is 'her'",
    ]
    plan_with(story, model, "method.mask_words=all")
    plan_with(story, model, "method.name=none")


def test_a_plan_for_a_cluster_says_where(story: Story, folder: Path) -> None:
    nodes = [
        NodeFacts("1", "alpha", cpus=2, gpus=0, store_bytes=10**9),
        NodeFacts("2", "beta", cpus=1, gpus=0, store_bytes=2 * 10**9),
    ]
    config = RenderConfig.from_yaml(None, [f"model.id={folder}"])
    assert render_plan(story, config).execution is None
    plan = render_plan(story, config, cluster=ClusterFacts(tuple(nodes)))
    lines = plan_text(plan).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("workers"))
    assert lines[start - 1 : start + 5] == [
        "cache     88.5 MB of keys and values for one scene",
        "workers   3 on cpu, 1 CPU each: 1 wave",
        "policy    window: 2 frame videos and their identity video fit in one wave of 3 workers; "
        "so 4 steps of keys and values are kept, 14.2 MB, instead of 88.5 MB for a scene",
        "node      alpha: 2 workers, at most 14.2 MB of keys and values in a store of 1.0 GB",
        "node      beta: 1 worker, at most 14.2 MB of keys and values in a store of 2.0 GB",
        "degrees   1, 2, 4 ranks can share the tokens of a video",
    ]
    execution = json.loads(json.dumps(plan_json(plan)))["execution"]
    assert [node["workers"] for node in execution["nodes"]] == [2, 1]
    assert execution["why"] in lines[start + 1]

    config = RenderConfig.from_yaml(None, [f"model.id={folder}", "cache.policy=retain"])
    plan = render_plan(story, config, cluster=ClusterFacts(tuple(nodes)))
    assert "scenes    at most 1 at a time with a cache on one node" in plan_text(plan).splitlines()


def test_a_cluster_with_too_little_is_bad_input(story: Story, folder: Path) -> None:
    config = RenderConfig.from_yaml(None, [f"model.id={folder}"])
    with pytest.raises(ConfigError, match="has room for 0: no nodes"):
        render_plan(story, config, cluster=ClusterFacts(()))


def test_planning_loads_neither_torch_nor_diffusers(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "story.yaml"
    path.write_text(GOOD_STORY)
    code = (
        "import sys\n"
        "from bachvid.cli.main import main\n"
        f"main(['plan', {str(path)!r}, '--set', 'model.id={folder}'], standalone_mode=False)\n"
        "loaded = {'torch', 'diffusers', 'transformers', 'ray', 'av'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "a green robot, jumps" in result.stdout


def test_the_plan_tells_the_memory_of_a_gpu_with_and_without_offload(story: Story) -> None:
    plan = plan_with(story, "THUDM/CogVideoX-5b")
    memory, offload = (
        line for line in plan_text(plan).splitlines() if line.startswith(("memory", "offload"))
    )
    assert memory == (
        "memory    at most 21.1 GB of a GPU: 21.1 GB to encode prompts (the text encoder, 9.5 GB, "
        "is freed then), 14.2 GB to denoise (weights 11.1 GB) and 15.6 GB to decode"
    )
    assert offload == (
        "offload   none; model.offload=model holds only the component in use on the GPU: at most "
        "13.8 GB, and 21.1 GB without it"
    )
    frame = json.loads(json.dumps(plan_json(plan)))["memory"]["frame"]
    assert frame["weights"]["transformer"] == 11_140_566_144
    assert frame["phases"]["model"]["denoising"] == 11_140_566_144 + frame["forward"]


def test_ranks_of_two_kinds_have_a_line_each(story: Story) -> None:
    plan = plan_with(story, "THUDM/CogVideoX-5b", "parallel.identity_gpus=4")
    assert plan.memory.identity.forward < plan.memory.frame.forward
    lines = [line for line in plan_text(plan).splitlines() if line.startswith("memory")]
    assert [line.partition(":")[0] for line in lines] == [
        "memory    rank of an identity video",
        "memory    rank of a frame video",
    ]


def test_weights_that_are_not_here_are_not_counted(story: Story, folder: Path) -> None:
    text = plan_text(plan_with(story, folder))
    assert "beside weights that are not here to be counted" in text
    assert "offload" not in text
