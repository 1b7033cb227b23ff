"""What only a GPU can show: xfuser's groups, bf16 on CUDA, pinned copies, bytes that are freed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from bachvid.attention.context import RunContext
from bachvid.attention.control import AttentionControl
from bachvid.attention.groups import ALONE, SequenceGroup
from bachvid.attention.rotary import Rotary
from bachvid.catalog.registry import load_facts, published_models
from bachvid.driver.events import Done, Failed
from bachvid.driver.renderer import StoryRenderer
from bachvid.engine.sampling import denoise
from bachvid.inputs.sections import ModelConfig
from bachvid.inputs.story import Story
from bachvid.kv.cache import Shard
from bachvid.kv.packing import StepPacker
from bachvid.kv.pulling import PulledPieces
from bachvid.layout.gangs import BRANCHES, Gang
from bachvid.layout.records import Records, RecordSet
from bachvid.layout.tokens import TokenLayout
from bachvid.methods.base import Run
from bachvid.models.base import VideoModel
from bachvid.models.cogvideox import CogVideoXControlledProcessor
from bachvid.models.registry import load_model
from bachvid.planning.config import RenderConfig
from bachvid.planning.memory import rank_memory
from bachvid.planning.resolve import build_method, resolve_config
from bachvid.prompts.compose import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda", 0)
FAMILIES = ["tiny_cogvideox_folder", "tiny_wan_folder"]
SIZES = ("video.pixel_frames=5", "video.height=32", "video.width=32", "sampling.num_steps=2")


def denoised(folder: Path, group: SequenceGroup) -> Tensor:
    """The latents of one video of two steps, with every layer controlled."""
    config = ModelConfig(id=str(folder), device="cuda")
    facts = load_facts(config)
    resolved = resolve_config(RenderConfig.from_yaml(None, SIZES), facts)
    model = load_model(config, facts, group)
    embeds_PTC = model.encode_prompts([Prompt("a red robot, a sunny beach, walks"), Prompt("")])
    run = RunContext(model.layout(resolved.video), model.rotary(resolved.video), group=group)
    steps = denoise(
        model,
        run,
        Run((0, 1)),
        prompt_embeds=embeds_PTC[:1],
        negative_embeds=embeds_PTC[1:],
        noise=model.initial_noise(7, resolved.video),
        noise_seed=7,
        sampling=resolved.sampling,
        control=AttentionControl(),
    )
    return [done.latents for done in steps][-1]


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[SequenceGroup]:
    """The group that xfuser makes, over NCCL, for a gang of one rank."""
    from bachvid.attention.parallel import join_group

    group = join_group(Gang(), 0, device=CUDA, init_file=tmp_path / "gang")
    yield group
    group.close()


def test_xfusers_group_of_one_gives_what_it_is_given(group_of_one: SequenceGroup) -> None:
    x_BSHD, layout = torch.randn(2, 12, 4, 8, device=CUDA), TokenLayout(2, 1, 2, 5)
    assert torch.equal(group_of_one.to_heads(x_BSHD, layout), x_BSHD)
    assert torch.equal(group_of_one.to_tokens(x_BSHD, layout), x_BSHD)
    for give in (group_of_one.sum, group_of_one.from_cond):
        assert torch.equal(give(x_BSHD), x_BSHD)
    x_BNC = x_BSHD.flatten(2)
    assert torch.equal(group_of_one.gather_tokens(x_BNC, 12), x_BNC)
    assert (group_of_one.rank, group_of_one.size) == (ALONE.rank, ALONE.size)


@pytest.mark.parametrize("fixture", FAMILIES)
def test_a_video_is_the_same_through_xfusers_group_of_one(
    fixture: str, group_of_one: SequenceGroup, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    assert torch.equal(denoised(folder, group_of_one), denoised(folder, ALONE))


@pytest.mark.parametrize("fixture", FAMILIES)
def test_a_story_is_rendered_in_bf16(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    story = Story.model_validate(
        {
            "title": "One scene",
            "seed": 1,
            "scenes": [
                {
                    "id": "sea",
                    "background": "the sea at night",
                    "character": "a small robot",
                    "actions": ["runs"],
                }
            ],
        }
    )
    overrides = (
        f"model.id={request.getfixturevalue(fixture)}",
        "model.dtype=bfloat16",
        "model.device=cuda",
        "method.profile=paper",
        "method.mask_step=1",
        "method.inject_steps=[0, 2]",
        "output.min_height=32",
    )
    config = RenderConfig.from_yaml(None, [*SIZES, *overrides])
    with StoryRenderer(config, tmp_path / "run") as renderer:
        events = list(renderer.stream(story))
    assert not [event for event in events if isinstance(event, Failed)]
    assert {event.video for event in events if isinstance(event, Done)} == {"identity", "runs"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_and_values_come_back_from_pinned_memory_as_they_went(dtype: torch.dtype) -> None:
    share = Gang().share(0, 4)
    records = Records((RecordSet(("key", "value"), (0, 1), (0,), BRANCHES),))
    recorded = {}
    for site in records.sites(0):
        key_BMHD, value_BMHD = torch.randn(2, 1, 30, 4, 8, device=CUDA, dtype=dtype)
        recorded[site] = Shard(site, {"key": key_BMHD, "value": value_BMHD})
    packer = StepPacker(share=share, records=records, config_hash="c")
    for shard in recorded.values():
        packer.put(shard)
    packed = packer.take(0)
    assert packed is not None
    store = PulledPieces(
        lambda run, place: [packed],
        share=share,
        records=records,
        passes=(BRANCHES,),
        config_hash="c",
    )
    store.begin((0,))
    for site, shard in recorded.items():
        staged = store.get(site)
        for kind, piece in shard.pieces.items():
            assert staged.pieces[kind].is_pinned()
            assert torch.equal(staged.pieces[kind].to(CUDA), piece)
    store.close()


def held_bytes() -> int:
    gc.collect()
    return torch.cuda.memory_allocated(CUDA)


@pytest.mark.parametrize("fixture", FAMILIES)
def test_offload_leaves_one_component_at_a_time_on_the_gpu(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    config = ModelConfig(id=str(folder), device="cuda", offload="model")
    facts = load_facts(config)
    video = resolve_config(RenderConfig.from_yaml(None, SIZES), facts).video
    before = held_bytes()
    model: VideoModel = load_model(config, facts, ALONE)
    assert held_bytes() == before
    embeds_PTC = model.encode_prompts([Prompt("a red robot")])
    model.free_text_encoder()
    latents = model.initial_noise(0, video)
    timestep = torch.zeros((), device=CUDA)
    run = RunContext(model.layout(video), model.rotary(video), branches=("cond",))
    assert run.rotary.cos_ND is not None
    assert run.rotary.cos_ND.device == CUDA
    model.predict(latents, timestep, embeds_PTC)
    assert {x.device.type for x in model.transformer.parameters()} == {"cuda"}
    assert {x.device.type for x in model.vae.parameters()} == {"cpu"}
    model.decode(latents)
    assert {x.device.type for x in model.transformer.parameters()} == {"cpu"}
    assert {x.device.type for x in model.vae.parameters()} == {"cuda"}


def test_a_layer_of_full_size_needs_the_bytes_of_the_plan() -> None:
    facts = published_models()["THUDM/CogVideoX-5b"]
    overrides = (f"model.id={facts.name}", "method.name=none")
    config = resolve_config(RenderConfig.from_yaml(None, overrides), facts)
    layout = facts.layout(config.video)
    dtype = torch.bfloat16
    with torch.device(CUDA):
        transformer = CogVideoXTransformer3DModel(
            num_layers=1, num_attention_heads=48, use_rotary_positional_embeddings=True
        ).to(dtype)
        latents = torch.randn(2, 13, 16, 60, 90, dtype=dtype)
        text = torch.randn(2, facts.text_tokens, facts.text_dim, dtype=dtype)
        timestep = torch.zeros(2)
    before = held_bytes()
    table = torch.ones(2, layout.video_tokens, facts.head_dim, device=CUDA)
    run = RunContext(layout, Rotary(table[0], table[1]))
    processor = CogVideoXControlledProcessor(0, run, AttentionControl())
    transformer.set_attn_processor({"transformer_blocks.0.attn1.processor": processor})
    torch.cuda.reset_peak_memory_stats(CUDA)
    with torch.no_grad():
        transformer(
            hidden_states=latents,
            encoder_hidden_states=text,
            timestep=timestep,
            image_rotary_emb=(table[0], table[1]),
            return_dict=False,
        )
    measured = torch.cuda.max_memory_allocated(CUDA) - before
    method = build_method(config)
    planned = rank_memory(config, facts, method, Gang(), renders_frames=False).forward
    assert planned == pytest.approx(measured, rel=0.03)
