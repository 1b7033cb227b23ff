"""Models small enough for a test and real: every class is the one that the big weights use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_families import TINY_FAMILIES, TinyFamily, load_tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from bachvid.catalog.profiles import wan_attention
from bachvid.inputs.choices import SchedulerName
from bachvid.models.base import VideoModel

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

TEXT_TOKENS = 16
PIXEL_FRAMES, HEIGHT, WIDTH = 5, 32, 48
WORDS = """
    , . a the of in on and with girl boy dog cat robot fox yellow red blue green dress coat hat
    snowy sunny dark forest beach city street garden lighthouse sea night day small old
    walks to right left jumps waves sits runs reads dances looks up down
"""
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS.split()])}


@pytest.fixture(scope="session")
def tiny_cogvideox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder like CogVideoX-5b's (RoPE): 3 layers, 2 heads x 16, 72 video tokens."""
    return save_tiny_cogvideox(tmp_path_factory.mktemp("tiny_cogvideox"), has_rope=True)


@pytest.fixture(scope="session")
def tiny_cogvideox_2b_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder like CogVideoX-2b's: the same sizes, positions added once, no RoPE."""
    return save_tiny_cogvideox(tmp_path_factory.mktemp("tiny_cogvideox_2b"), has_rope=False)


@pytest.fixture(scope="session")
def tiny_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder like Wan2.1's: 3 layers, 6 heads x 12, 72 video tokens."""
    return save_tiny_wan(tmp_path_factory.mktemp("tiny_wan"))


@pytest.fixture(scope="session")
def three_nodes() -> Iterator[Cluster]:
    """A cluster of three nodes of one CPU each, for the tests that harm none of them."""
    from clusters import cluster_of

    with cluster_of(3) as cluster:
        yield cluster


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def tiny(request: pytest.FixtureRequest) -> TinyFamily:
    """Each family in turn."""
    return TINY_FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(tiny: TinyFamily, request: pytest.FixtureRequest) -> Path:
    """The folder of `tiny`."""
    found: Path = request.getfixturevalue(tiny.fixture)
    return found


@pytest.fixture(scope="module")
def model(folder: Path) -> VideoModel:
    """The model of `tiny`, in fp32."""
    return load_tiny(folder)


@pytest.fixture(scope="module")
def pipeline(tiny: TinyFamily, folder: Path) -> DiffusionPipeline:
    """The stock pipeline of `tiny`."""
    return tiny.stock(folder)


@pytest.fixture(params=[0, 1], ids=["first scheduler", "second scheduler"])
def scheduler(tiny: TinyFamily, request: pytest.FixtureRequest) -> SchedulerName:
    """Each scheduler of `tiny` in turn."""
    found: SchedulerName = list(tiny.schedulers)[request.param]
    return found


def save_tiny_cogvideox(folder: Path, *, has_rope: bool) -> Path:
    """Save random weights, the same at every call, in the layout of a Hub repository."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CogVideoXPipeline(
            tokenizer=build_tokenizer(),
            text_encoder=build_text_encoder(),
            vae=build_vae(),
            transformer=build_transformer(has_rope=has_rope),
            scheduler=CogVideoXDDIMScheduler(
                prediction_type="v_prediction",
                timestep_spacing="trailing",
                rescale_betas_zero_snr=True,
                clip_sample=False,
                snr_shift_scale=1.0,
            ),
        ).save_pretrained(folder)
    return folder


def save_tiny_wan(folder: Path) -> Path:
    """Save random weights, the same at every call, and a `storybook.json` for short prompts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        WanPipeline(
            tokenizer=build_tokenizer(),
            text_encoder=UMT5EncoderModel(
                UMT5Config(
                    vocab_size=len(VOCABULARY),
                    d_model=16,
                    d_kv=8,
                    d_ff=32,
                    num_layers=2,
                    num_heads=2,
                )
            ).eval(),
            vae=AutoencoderKLWan(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 0.8, 2.0, 1.2],
                scale_factor_temporal=2,
                scale_factor_spatial=4,
            ).eval(),
            transformer=build_wan_transformer(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        ).save_pretrained(folder)
    own = {
        "text_tokens": TEXT_TOKENS,
        "defaults": {
            "pixel_frames": PIXEL_FRAMES,
            "height": HEIGHT,
            "width": WIDTH,
            "fps": 8,
            "num_steps": 4,
            "guidance_scale": 3.0,
            "scheduler": "unipc",
            "dtype": "float32",
            "noise": "same",
        },
        "attention": wan_attention(3, flow_shift=3.0).model_dump(mode="json"),
    }
    (folder / "storybook.json").write_text(json.dumps(own))
    return folder


def build_wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=32,
    ).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, padded and closed as T5 does: `<pad>` is 0, `</s>` is 1."""
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_TOKENS,
    )


def build_text_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return T5EncoderModel(config).eval()


def build_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
        sample_height=HEIGHT,
        sample_width=WIDTH,
        scaling_factor=0.7,
    ).eval()


def build_transformer(*, has_rope: bool) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=3,
        sample_width=WIDTH // 4,
        sample_height=HEIGHT // 4,
        sample_frames=PIXEL_FRAMES,
        patch_size=2,
        temporal_compression_ratio=2,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=has_rope,
    ).eval()
