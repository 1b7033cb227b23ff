"""A model folder without weights: what `plan` reads of the storybook model, and no more."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

VOCABULARY = {
    "background": ["a snowy forest", "a desert", "a rocky coast with a lighthouse"],
    "character": ["a girl in a yellow dress", "a green robot"],
    "action": ["stands still", "walks to the right", "jumps"],
}
TEXT_TOKENS = 20
TRANSFORMER: dict[str, object] = {
    "num_layers": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 12,
    "max_text_seq_length": TEXT_TOKENS,
    "text_embed_dim": 96,
    "use_rotary_positional_embeddings": True,
    "patch_size": 1,
    "sample_frames": 5,
    "sample_height": 12,
    "sample_width": 12,
}
FILES: dict[str, dict[str, object]] = {
    "model_index.json": {"_class_name": "CogVideoXPipeline"},
    "transformer/config.json": TRANSFORMER,
    "vae/config.json": {
        "latent_channels": 12,
        "block_out_channels": [16, 32, 32],
        "temporal_compression_ratio": 2,
    },
    "text_encoder/config.json": {"d_model": 96},
    "tokenizer/tokenizer_config.json": {"pad_token": "<pad>"},
}
STORYBOOK = {
    "vocabulary": VOCABULARY,
    "defaults": {
        "pixel_frames": 5,
        "height": 48,
        "width": 48,
        "fps": 4,
        "num_steps": 25,
        "guidance_scale": 3.0,
        "scheduler": "ddim",
        "dtype": "float32",
        "noise": "same",
        "seconds_per_forward": 0.05,
    },
    "attention": {
        "vital_layers": list(range(8)),
        "mask_layers": [2, 3, 4, 5],
        "match_layers": [1, 2, 3, 4],
        "mask_level": 0.4,
        "inject_levels": {"paper": 0.52, "fast": 1.0},
    },
}


def write_json_model(folder: Path, *, with_vocabulary: bool) -> Path:
    """Write the json files of a small CogVideoX; with a vocabulary, it is like the storybook."""
    files = {**FILES, "storybook.json": STORYBOOK} if with_vocabulary else FILES
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    _tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def write_json_wan(folder: Path) -> Path:
    """Write the json files of a small Wan2.1."""
    files: dict[str, dict[str, object]] = {
        "model_index.json": {"_class_name": "WanPipeline", "transformer_2": [None, None]},
        "transformer/config.json": {
            "num_layers": 8,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "in_channels": 12,
            "text_dim": 96,
            "patch_size": [1, 2, 2],
        },
        "vae/config.json": {
            "z_dim": 12,
            "dim_mult": [1, 2, 2],
            "temperal_downsample": [False, True],
            "scale_factor_spatial": 4,
            "scale_factor_temporal": 2,
        },
        "text_encoder/config.json": {"d_model": 96},
        "tokenizer/tokenizer_config.json": {"pad_token": "<pad>"},
        "scheduler/scheduler_config.json": {"flow_shift": 5.0},
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    _tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def _tokenizer() -> Tokenizer:
    phrases = [phrase for part in VOCABULARY.values() for phrase in part]
    words = sorted({word for phrase in phrases for word in phrase.split()})
    ids = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", ",", *words])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer
