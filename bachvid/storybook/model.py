"""The parts of the storybook model: real diffusers and transformers classes at a small size.

Everything a checkpoint needs to be a diffusers CogVideoX folder is built here, so that training,
tests and the package agree on it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from bachvid.storybook.world import ACTIONS, BACKGROUNDS, CHARACTERS

FRAME_SIZE = 64
PIXEL_FRAMES = 9
TEXT_TOKENS = 20
NUM_LAYERS = 8
SPATIAL_RATIO = 4
TEMPORAL_RATIO = 2
LATENT_CHANNELS = 16
LATENT_FRAMES = 1 + (PIXEL_FRAMES - 1) // TEMPORAL_RATIO
LATENT_SIZE = FRAME_SIZE // SPATIAL_RATIO
WEIGHTS = Path(__file__).parent / "weights"

_NUM_HEADS, _HEAD_DIM, _TEXT_DIM = 4, 48, 96
_TIME_DIM = 64  # small: every layer has a matrix of 12 x 192 of these
_SPECIAL = ("<pad>", "</s>", "<unk>")
PAD_ID = _SPECIAL.index("<pad>")


def build_vae() -> AutoencoderKLCogVideoX:
    """Return an untrained video autoencoder: 9 x 64 x 64 pixels to 5 x 16 x 16 latents."""
    channels = (40, 64, 64)
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * len(channels),
        up_block_types=("CogVideoXUpBlock3D",) * len(channels),
        block_out_channels=channels,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=TEMPORAL_RATIO,
        sample_height=FRAME_SIZE,
        sample_width=FRAME_SIZE,
        scaling_factor=1.0,
    )


def build_transformer() -> CogVideoXTransformer3DModel:
    """Return an untrained transformer: 1,280 video and 20 text tokens, 8 layers, 4 heads of 48."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=_NUM_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=_TIME_DIM,
        text_embed_dim=_TEXT_DIM,
        num_layers=NUM_LAYERS,
        sample_width=LATENT_SIZE,
        sample_height=LATENT_SIZE,
        sample_frames=PIXEL_FRAMES,
        patch_size=1,
        temporal_compression_ratio=TEMPORAL_RATIO,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=True,
    )
    # Every block begins near the identity: without this, training at this size does not start.
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            torch.nn.init.zeros_(norm.linear.weight)
            torch.nn.init.zeros_(norm.linear.bias)
            for gate in (2, 5):
                norm.linear.bias.data.view(6, -1)[gate] = 0.25
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the world's vocabulary, with the special tokens of T5."""
    phrases = " ".join((*BACKGROUNDS, *CHARACTERS, *ACTIONS)).lower().split()
    words = [*_SPECIAL, ",", *sorted(set(phrases))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_TOKENS,
    )


def build_text_encoder(vocabulary_size: int) -> T5EncoderModel:
    """Return an untrained two-layer T5 encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary_size,
            d_model=_TEXT_DIM,
            d_kv=_TEXT_DIM // 4,
            d_ff=2 * _TEXT_DIM,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def build_scheduler() -> CogVideoXDDIMScheduler:
    """Return the noise schedule that the model is trained on: v-prediction, zero terminal SNR."""
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=1.0,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def save_storybook(
    folder: Path,
    *,
    vae: AutoencoderKLCogVideoX,
    transformer: CogVideoXTransformer3DModel,
    text_encoder: T5EncoderModel,
) -> None:
    """Write a diffusers CogVideoX folder with float16 safetensors."""
    pipeline = CogVideoXPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(),
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
