"""GPU bytes: the formulas against real classes of full size, on the meta device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    WanTransformer3DModel,
)
from live_bytes import FusedKernels, LiveBytes
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionControl, KVGroup
from bachvid.attention.groups import ALONE, SequenceGroup
from bachvid.attention.parallel import JoinedGroup
from bachvid.attention.rotary import Rotary
from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.files import Component, ComponentSize
from bachvid.catalog.registry import load_facts, published_models
from bachvid.errors import ModelSupportError
from bachvid.inputs.sections import ModelConfig
from bachvid.layout.gangs import Gang
from bachvid.layout.records import AttentionSite
from bachvid.models import cogvideox, wan
from bachvid.models.base import shard_tokens
from bachvid.planning import memory
from bachvid.planning.config import RenderConfig, ResolvedConfig
from bachvid.planning.memory import RankMemory, WeightBytes, rank_memory, weight_bytes
from bachvid.planning.plan import records_bytes
from bachvid.planning.resolve import build_method, resolve_config

COG_2B, COG_5B = "THUDM/CogVideoX-2b", "THUDM/CogVideoX-5b"
WAN_1B, WAN_14B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
PUBLISHED = published_models()
MODELS = (COG_2B, COG_5B, WAN_1B, WAN_14B)
KEPT = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")  # by diffusers, in Wan


def build_transformer(facts: ModelFacts, *, num_layers: int | None = None) -> Any:
    """The real class at its real size, without memory, in the dtypes in which it is loaded."""
    layers, heads = num_layers or facts.num_layers, facts.num_heads
    with torch.device("meta"):
        if facts.family == "cogvideox":
            transformer = CogVideoXTransformer3DModel(
                num_layers=layers,
                num_attention_heads=heads,
                use_rotary_positional_embeddings=facts.has_rope,
            )
        else:
            transformer = WanTransformer3DModel(
                num_layers=layers, num_attention_heads=heads, ffn_dim=facts.ffn_dim
            )
    dtype = getattr(torch, facts.defaults.dtype)
    for name, parameter in transformer.named_parameters():
        is_kept = facts.family == "wan" and set(KEPT) & set(name.split("."))
        parameter.data = parameter.data.to(torch.float32 if is_kept else dtype)
    return transformer.eval().requires_grad_(False)


def build_vae(facts: ModelFacts) -> Any:
    with torch.device("meta"):
        if facts.family == "wan":
            return AutoencoderKLWan().eval()
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(128, 256, 256, 512),
            latent_channels=16,
            layers_per_block=3,
        )
        return vae.to(getattr(torch, facts.defaults.dtype)).eval()


def build_text_encoder(facts: ModelFacts) -> nn.Module:
    sizes: Any = {
        "d_model": facts.text_dim,
        "d_kv": 64,
        "d_ff": 10_240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    }
    with torch.device("meta"):
        if facts.family == "wan":
            encoder: nn.Module = UMT5EncoderModel(UMT5Config(vocab_size=256_384, **sizes))
        else:
            encoder = T5EncoderModel(T5Config(vocab_size=32_128, **sizes))
    return encoder


def resolved(facts: ModelFacts, *overrides: str) -> ResolvedConfig:
    return resolve_config(
        RenderConfig.from_yaml(None, [f"model.id={facts.name}", *overrides]), facts
    )


def memory_of(
    facts: ModelFacts, gang: Gang, *overrides: str, renders_frames: bool = True
) -> RankMemory:
    config = resolved(facts, *overrides)
    return rank_memory(config, facts, build_method(config), gang, renders_frames=renders_frames)


@pytest.mark.parametrize("model_id", MODELS)
def test_the_weights_of_the_published_models_are_those_of_the_real_classes(model_id: str) -> None:
    facts = PUBLISHED[model_id]
    built: dict[Component, tuple[nn.Module, Sequence[str]]] = {
        "transformer": (build_transformer(facts), KEPT if facts.family == "wan" else ()),
        "vae": (build_vae(facts), ()),
        "text_encoder": (build_text_encoder(facts), ("wo",)),
    }
    for component, (module, kept) in built.items():
        sizes = {name: value.numel() for name, value in module.named_parameters()}
        fp32 = sum(n for name, n in sizes.items() if set(kept) & set(name.split(".")))
        assert facts.sizes is not None
        assert facts.sizes[component] == ComponentSize(sum(sizes.values()), fp32), component


def test_every_published_model_has_its_sizes() -> None:
    for facts in PUBLISHED.values():
        transformer = build_transformer(facts)
        loaded = sum(value.numel() * value.itemsize for value in transformer.parameters())
        weights = weight_bytes(facts, facts.defaults.dtype)
        assert weights is not None
        assert weights.transformer == loaded


def test_weights_take_the_bytes_of_the_dtypes_that_they_are_loaded_in() -> None:
    # bf16: 11.14 GB, 0.43 GB, 9.52 GB. In fp16 a fifth of the text encoder stays in fp32.
    facts = PUBLISHED[COG_5B]
    assert weight_bytes(facts, "bfloat16") == WeightBytes(
        11_140_566_144, 431_167_814, 9_524_621_312
    )
    half = weight_bytes(facts, "float16")
    assert half is not None
    assert half.text_encoder == 9_524_621_312 + 2 * 1_006_632_960
    # Wan's autoencoder is in fp32.
    wan_bytes = weight_bytes(PUBLISHED[WAN_14B], "bfloat16")
    assert wan_bytes is not None
    assert wan_bytes.vae == 126_892_531 * 4


def test_the_weights_of_a_folder_are_counted_in_its_files(
    tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    facts = load_facts(ModelConfig(id=str(tiny_cogvideox_folder)))
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        tiny_cogvideox_folder, subfolder="transformer"
    )
    weights = weight_bytes(facts, "float32")
    assert weights is not None
    assert weights.transformer == 4 * sum(x.numel() for x in transformer.parameters())

    (tmp_path / "transformer").mkdir()
    assert weight_bytes(replace(facts, folder=tmp_path), "float32") is None
    for damaged in (b"", b"\xff" * 20, (2).to_bytes(8, "little") + b"[]"):
        (tmp_path / "transformer" / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ModelSupportError, match=r"model\.safetensors: not a safetensors file"):
            weight_bytes(replace(facts, folder=tmp_path), "float32")


def test_a_folder_in_several_files_is_counted_once_for_each_tensor(tmp_path: Path) -> None:
    facts = PUBLISHED[WAN_14B]
    files: dict[str, dict[str, list[int]]] = {
        "transformer/a-00001-of-00002.safetensors": {"blocks.0.norm2.weight": [8], "x": [2, 3]},
        "transformer/a-00002-of-00002.safetensors": {"y": [5]},
        "transformer/a.fp16.safetensors": {"y": [5]},
        "vae/a.safetensors": {"z": []},
        "text_encoder/a.safetensors": {"layer.wo.weight": [4, 4], "shared": [10]},
    }
    for name, shapes in files.items():
        header = json.dumps(
            {"__metadata__": {}} | {key: {"shape": shape} for key, shape in shapes.items()}
        ).encode()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 99)
    folder_facts = replace(facts, folder=tmp_path)
    assert weight_bytes(folder_facts, "bfloat16") == WeightBytes(8 * 4 + 11 * 2, 4, 26 * 2)
    assert weight_bytes(folder_facts, "float16") == WeightBytes(8 * 4 + 11 * 2, 4, 16 * 4 + 10 * 2)


# --- a forward ----------------------------------------------------------------------------------


class EveryTokenInjected(AttentionControl):
    """Gives every video row the key of a token, as no story does: what `rank_memory` bounds."""

    def __init__(self, facts: ModelFacts, run: RunContext) -> None:
        num_tokens = run.layout.video_tokens
        heads = facts.num_heads // run.group.size
        dtype = getattr(torch, facts.defaults.dtype)
        self.key_BMHD = torch.empty(
            1, num_tokens, heads, facts.head_dim, device="meta", dtype=dtype
        )
        self.positions = torch.empty(num_tokens, device="meta", dtype=torch.int64)

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        key_BMHD, value_BMHD = self.key_BMHD.clone(), self.key_BMHD.clone()  # as from the host
        return [KVGroup(self.positions, key_BMHD, value_BMHD, self.positions)]


@pytest.fixture
def group_of() -> Iterator[Callable[[int], SequenceGroup]]:
    """Our group over a process group that sends nothing: the tensors of one rank, by shape."""

    def join(size: int) -> SequenceGroup:
        if size == 1:
            return ALONE
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        world = dist.group.WORLD
        assert world is not None
        return JoinedGroup(0, size, 0, 1, world, world, dist.destroy_process_group)

    yield join
    if dist.is_initialized():
        dist.destroy_process_group()


def measure_forward(facts: ModelFacts, group: SequenceGroup, *, injects: bool) -> int:
    """Run one forward of one layer as `predict` does, and give its peak and its tables."""
    layout = facts.layout(resolved(facts).video)
    frames, height, width = (layout.latent_frames, layout.grid_height * 2, layout.grid_width * 2)
    transformer = build_transformer(facts, num_layers=1)
    dtype = getattr(torch, facts.defaults.dtype)
    num_branches = len(facts.passes[0])
    with torch.device("meta"):
        rotary = Rotary.none()
        if facts.has_rope:
            table = torch.empty(2, layout.video_tokens, facts.head_dim)
            rotary = Rotary(table[0], table[1])
        text = torch.empty(num_branches, facts.text_tokens, facts.text_dim, dtype=dtype)
        timestep = torch.empty(num_branches)
        cog_latents = torch.empty(num_branches, frames, 16, height, width, dtype=dtype)
    run = RunContext(layout, rotary, branches=facts.passes[0], group=group)
    control = EveryTokenInjected(facts, run) if injects else AttentionControl()
    given: dict[str, object] = {
        "timestep": timestep,
        "encoder_hidden_states": text,
        "return_dict": False,
    }
    if facts.family == "cogvideox":
        shard_tokens(transformer.transformer_blocks[0], transformer.norm_final, group)
        processors: dict[str, object] = {
            "transformer_blocks.0.attn1.processor": cogvideox.CogVideoXControlledProcessor(
                0, run, control
            )
        }
        given |= {
            "hidden_states": cog_latents,
            "image_rotary_emb": (rotary.cos_ND, rotary.sin_ND) if facts.has_rope else None,
        }
    else:
        shard_tokens(transformer.blocks[0], transformer.norm_out, group)
        processors = {
            "blocks.0.attn1.processor": wan.WanSelfAttention(0, run, control),
            "blocks.0.attn2.processor": wan.WanCrossAttention(0, run, control),
        }
        given["hidden_states"] = cog_latents.transpose(1, 2)
    transformer.set_attn_processor(processors)
    with torch.no_grad(), FusedKernels(), LiveBytes() as live:
        transformer(**given)
    own_table = 2 * layout.video_tokens * facts.head_dim * 4 if facts.has_rope else 0
    if facts.family == "cogvideox":
        own_table += sum(x.numel() * x.itemsize for x in transformer.buffers())
    total: int = live.peak + own_table
    return total


@pytest.mark.parametrize("injects", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("model_id", MODELS)
def test_a_forward_needs_what_real_blocks_of_full_size_need(
    model_id: str, ranks: int, injects: bool, group_of: Callable[[int], SequenceGroup]
) -> None:
    facts = PUBLISHED[model_id]
    if facts.num_heads % ranks:
        pytest.skip(f"{facts.num_heads} heads do not divide by {ranks}")
    measured = measure_forward(facts, group_of(ranks), injects=injects)
    planned = memory_of(facts, Gang(ranks), "method.branches=both", renders_frames=injects).forward
    assert planned == pytest.approx(measured, rel=0.01)


def test_ranks_and_branches_apart_need_less() -> None:
    facts = PUBLISHED[COG_5B]

    def forward(gang: Gang, *overrides: str, renders_frames: bool = True) -> int:
        overrides = overrides or ("method.branches=both",)
        return memory_of(facts, gang, *overrides, renders_frames=renders_frames).forward

    # One branch in a forward, not two.
    plain = forward(Gang(), renders_frames=False)
    assert forward(Gang(2, 2), renders_frames=False) == pytest.approx(plain / 2, rel=0.01)
    assert forward(Gang(), "sampling.guidance_scale=1") == forward(Gang(2, 2))
    assert forward(Gang(4)) < forward(Gang(2)) < forward(Gang())
    assert forward(Gang(2), "method.branches=cond") < forward(Gang(2))
    assert forward(Gang(), "method.name=none") == plain


# --- decoding, and the phases of a render -------------------------------------------------------


@pytest.mark.parametrize(
    ("model_id", "size"),
    [
        (COG_5B, (17, 240, 352)),
        (WAN_14B, (9, 240, 256)),
        pytest.param(COG_5B, (49, 480, 720), marks=pytest.mark.slow),
        pytest.param(WAN_14B, (81, 480, 832), marks=pytest.mark.slow),
        pytest.param(WAN_14B, (81, 720, 1280), marks=pytest.mark.slow),
    ],
)
def test_a_decode_needs_what_the_real_autoencoder_needs(
    model_id: str, size: tuple[int, int, int]
) -> None:
    facts, (pixel_frames, height, width) = PUBLISHED[model_id], size
    vae = build_vae(facts)
    decoder = facts.traits.decoder
    if height * width >= decoder.tiled_from:
        vae.enable_tiling(*decoder.tile)
    shape = (1, 16, (pixel_frames - 1) // 4 + 1, height // 8, width // 8)
    latents = torch.empty(shape, dtype=vae.dtype, device="meta")
    with torch.no_grad(), LiveBytes() as live:
        vae.decode(latents)
    names = ("pixel_frames", "height", "width")
    overrides = [f"video.{name}={value}" for name, value in zip(names, size, strict=True)]
    planned = memory_of(facts, Gang(), *overrides).decode
    assert planned == pytest.approx(live.peak, rel=0.02)


def test_offload_holds_one_component_at_a_time() -> None:
    weights = WeightBytes(transformer=100, vae=10, text_encoder=50)
    rank = RankMemory(weights, forward=7, matching=3, decode=60)
    assert rank.phases("none") == (160, 117, 170)
    assert rank.phases("model") == (50, 107, 70)
    assert replace(rank, weights=None).phases("none") is None


@pytest.mark.parametrize("name", ["paper", "fast"])
@pytest.mark.parametrize("model_id", MODELS)
def test_injection_needs_no_more_than_a_tenth_beside_the_plain_video(
    model_id: str, name: str
) -> None:
    facts = PUBLISHED[model_id]
    injected, plain = (
        memory_of(facts, Gang(), f"method.profile={name}", renders_frames=injects).phases("none")
        for injects in (True, False)
    )
    assert injected is not None
    assert plain is not None
    assert injected.denoising <= 1.10 * plain.denoising


@pytest.mark.parametrize(
    ("model_id", "kv_megabytes", "feature_megabytes"),
    [
        (COG_2B, 134.8, 67.4),
        (COG_5B, 215.65, 107.8),
        (WAN_1B, 201.3, 100.6),
        (WAN_14B, 670.9, 335.5),
    ],
)
def test_keys_values_and_features_have_the_bytes_of_the_notes(
    model_id: str, kv_megabytes: float, feature_megabytes: float
) -> None:
    facts = PUBLISHED[model_id]
    one = ("method.vital_layers=[0]", "method.inject_steps=[0, 1]", "method.branches=cond")
    config = resolved(facts, *one, "method.pre_pass_injection=none", "method.pre_passes=1")
    method = build_method(config)
    assert records_bytes(method.records, config, facts) == pytest.approx(
        kv_megabytes * 1e6, rel=0.001
    )
    sizes = memory._Sizes.of(config, facts, method, Gang())
    assert sizes.own_video // sizes.batch == pytest.approx(feature_megabytes * 1e6, rel=0.001)
