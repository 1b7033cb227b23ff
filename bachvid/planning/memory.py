"""GPU bytes of a render, before any weight is loaded: what one rank of a gang holds at most.

Pure: no torch. Counted are tensors: their sum is what `torch.cuda.max_memory_allocated` shows. The
CUDA context, what the allocator keeps for later and the workspace of a convolution come on top.
Attention is that of PyTorch's fused kernels, so no matrix of queries by keys is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.families import Family
from bachvid.catalog.files import PartSize, read_part_sizes
from bachvid.inputs.choices import DTYPE_BYTES, Dtype, Offload
from bachvid.layout.gangs import Gang
from bachvid.layout.tokens import TokenLayout
from bachvid.methods.base import Matching, Method
from bachvid.planning.config import ResolvedConfig

# What of the tokens is character while tokens are matched: the most in the paper's stories.
_CHARACTER_SHARE = 0.3
_MATCH_CHUNK = 1024  # query rows at once, of `match_tokens`


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of the parts of a model, in the dtypes in which they are loaded."""

    transformer: int
    vae: int
    text_encoder: int


class PhaseBytes(NamedTuple):
    """Bytes while prompts are encoded, videos denoised, and latents made into frames."""

    encoding: int
    denoising: int
    decoding: int


@dataclass(frozen=True, slots=True)
class RankMemory:
    """GPU bytes of one rank, by what holds them.

    weights: None if neither the weights are here nor the model is one that is known.
    forward: activations of the transformer, of the step that needs most.
    matching: features and their products, once for each frame video, between two steps.
    decode: activations of the VAE, and the frames, of a rank that decodes alone. Ranks that share
        a decode need less.
    """

    weights: WeightBytes | None
    forward: int
    matching: int
    decode: int

    def phases(self, offload: Offload) -> PhaseBytes | None:
        """Add up what is held in each phase; None if the weights are not known.

        With `offload` only the part that works is there. What the text encoder needs beside its
        weights is little, and it is freed before the first video.
        """
        weights = self.weights
        if weights is None:
            return None
        parts = weights.transformer + weights.vae if offload == "none" else 0
        return PhaseBytes(
            encoding=parts + weights.text_encoder,
            denoising=(parts or weights.transformer) + max(self.forward, self.matching),
            decoding=(parts or weights.vae) + self.decode,
        )


@dataclass(frozen=True, slots=True)
class PlannedMemory:
    """What ranks of identity and of frame videos need; the same where one gang renders both."""

    identity: RankMemory
    frame: RankMemory


def plan_memory(
    config: ResolvedConfig,
    facts: ModelFacts,
    method: Method[Any],
    *,
    identity: Gang,
    frame: Gang,
) -> PlannedMemory:
    """Count for a render whose videos are rendered by these gangs."""
    memory = rank_memory(config, facts, method, frame, renders_frames=True)
    if identity == frame:
        return PlannedMemory(memory, memory)
    return PlannedMemory(rank_memory(config, facts, method, identity, renders_frames=False), memory)


def rank_memory(
    config: ResolvedConfig,
    facts: ModelFacts,
    method: Method[Any],
    gang: Gang,
    *,
    renders_frames: bool,
) -> RankMemory:
    """Count what a rank of `gang` needs: with `renders_frames` for both roles, else for identities."""
    injects = renders_frames and any(run.reads for run in method.runs("frame"))
    sizes = _Sizes.of(config, facts, method, gang)
    return RankMemory(
        weights=weight_bytes(facts, config.model.dtype),
        forward=_forward_bytes(sizes, facts, injects=injects),
        matching=_matching_bytes(sizes, method.matching) if injects and method.matching else 0,
        decode=_decode_bytes(config, facts),
    )


# --- weights ------------------------------------------------------------------------------------

# By part, the components of tensor names that both libraries keep in fp32.
_KEPT_IN_FP32: Mapping[str, frozenset[str]] = {
    "transformer": frozenset({"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}),
    "vae": frozenset(),
    "text_encoder": frozenset({"wo"}),
}

_T5_XXL = PartSize(4_762_310_656, 1_006_632_960)
_UMT5_XXL = PartSize(5_680_910_336, 1_006_632_960)

# Values in the weights of the published models. A test counts them in the real classes.
PUBLISHED_PARTS: Mapping[str, Mapping[str, PartSize]] = {
    name: {"transformer": transformer, "vae": PartSize(vae), "text_encoder": encoder}
    for name, transformer, vae, encoder in (
        *[
            (f"{owner}/CogVideoX-{size}", PartSize(values), 215_583_907, _T5_XXL)
            for owner in ("THUDM", "zai-org")
            for size, values in (("2b", 1_693_783_872), ("5b", 5_570_283_072))
        ],
        *[
            (f"Wan-AI/Wan2.1-T2V-{size}-Diffusers", part, 126_892_531, _UMT5_XXL)
            for size, part in (
                ("1.3B", PartSize(1_418_996_800, 3_127_296)),
                ("14B", PartSize(14_288_491_584, 29_184_000)),
            )
        ],
    )
}


def weight_bytes(facts: ModelFacts, dtype: Dtype) -> WeightBytes | None:
    """Return the bytes of a model's weights; None if its files are not here and it is unknown.

    In 16 bits, diffusers keeps some tensors of a Wan transformer in fp32, and transformers, in
    fp16 only, some of a text encoder. Wan's autoencoder is always in fp32 (`models/wan.py`).
    Raises ModelSupportError for a damaged file.
    """
    parts = PUBLISHED_PARTS.get(facts.name)
    if facts.folder is not None:
        parts = read_part_sizes(facts.folder, kept=_KEPT_IN_FP32)
    if parts is None:
        return None
    width, is_wan = DTYPE_BYTES[dtype], facts.family == "wan"
    return WeightBytes(
        transformer=parts["transformer"].nbytes(width, keeps_fp32=is_wan),
        vae=parts["vae"].nbytes(4 if is_wan else width),
        text_encoder=parts["text_encoder"].nbytes(width, keeps_fp32=dtype == "float16"),
    )


# --- a forward of the transformer ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of [rows, channels] in the model's dtype, as the tensors of a forward have them.

    `batch` branches are in one forward, and up to `injected` of them see identity keys. Of the
    `ranks` that share a branch each has all channels of its own rows: the text's, where attention
    is joint, and `own_video` of the video. Within attention it has all rows of its own heads.
    """

    layout: TokenLayout
    ranks: int
    width: int  # bytes of a value
    batch: int
    injected: int
    row: int  # of all channels, of one branch
    inner_row: int  # of the inner states of a feed-forward
    has_rope: bool

    @classmethod
    def of(
        cls, config: ResolvedConfig, facts: ModelFacts, method: Method[Any], gang: Gang
    ) -> _Sizes:
        width = DTYPE_BYTES[config.model.dtype]
        is_whole = config.sampling.guidance_scale > 1 and gang.cfg == 1
        batch = max(len(branches) for branches in facts.passes) if is_whole else 1
        return cls(
            layout=facts.layout(config.video),
            ranks=gang.sequence,
            width=width,
            batch=batch,
            injected=min(batch, max(len(method.records.branches), 1)),
            row=facts.num_heads * facts.head_dim * width,
            inner_row=facts.ffn_dim * width,
            has_rope=facts.has_rope,
        )

    @property
    def own_rows(self) -> int:
        """Rows of a rank, pads included, of all branches of a forward."""
        return self.batch * (self.layout.text_tokens + self.layout.rank_tokens(self.ranks))

    @property
    def own(self) -> int:
        return self.own_rows * self.row

    @property
    def own_video(self) -> int:
        return self.batch * self.layout.rank_tokens(self.ranks) * self.row

    @property
    def heads(self) -> int:
        """All joint rows of a rank's heads, of all branches."""
        return self.batch * self.layout.joint_tokens * self.row // self.ranks

    @property
    def held(self) -> int:
        """What a forward keeps of its input while its first block runs.

        With several ranks that is the whole video, and its padded copy of which a rank has a part.
        """
        if self.ranks == 1:
            return self.own
        padded = self.batch * self.layout.rank_tokens(self.ranks) * self.ranks * self.row
        return self.batch * self.layout.joint_tokens * self.row + padded


def _forward_bytes(sizes: _Sizes, facts: ModelFacts, *, injects: bool) -> int:
    """Bytes of a forward at its peak, beside the weights; tables of positions included.

    Each line is a place where diffusers' eager code is at its fullest. In a feed-forward a block
    holds its own hidden states, what attention gave, the normed states, and the inner states
    before and after the activation. Wan adds in fp32: both terms, and a product. Behind the
    blocks whole videos are normed and shifted, one tensor each, in Wan in fp32.
    """
    video = sizes.batch * sizes.layout.video_tokens * sizes.row
    places = [
        sizes.held + 3 * sizes.own + 2 * sizes.own_rows * sizes.inner_row,
        sizes.held + _attention_bytes(sizes, injects=injects),
    ]
    fp32_bytes = 4 * sizes.layout.video_tokens * facts.head_dim * 2  # a table: cosines and sines
    if facts.family == "wan":
        wide = 4 * sizes.own // sizes.width
        gathered = 4 * video // sizes.width
        places.append(sizes.held + 4 * sizes.own + 3 * wide)
        places.append(sizes.own + wide + (2 if sizes.ranks > 1 else 1) * gathered)
        tables = 2 * fp32_bytes  # ours, and the one that diffusers makes in every forward
    else:
        places.append(3 * video)
        tables = fp32_bytes
        if not facts.has_rope:  # added once to every row, kept in fp64
            tables = 8 * sizes.layout.joint_tokens * sizes.row // sizes.width
    return max(places) + tables


def _attention_bytes(sizes: _Sizes, *, injects: bool) -> int:
    """Bytes of the self-attention at its peak, beside what the forward holds.

    The normed states, and queries, keys and values of a rank's rows; with several ranks also
    those of its heads (`controlled_attention`). Then one of three: the keys are rotated, beside
    the rotated queries, by two products in fp32 (`Rotary.rotate`); one branch attends with groups
    (`attend`), whose keys and values of all injected branches are there, and besides all of them
    in the buffers of this branch, the keys also rotated, and queries and results once more; or
    the results go back to the rows in three copies, the text cut off and pads added before
    (`_to_tokens`). No story injects more than one key for every video row, so that is counted.
    """
    layout = sizes.layout
    own = 4 * sizes.own + (3 * sizes.heads if sizes.ranks > 1 else 0)
    head_video = sizes.batch * layout.video_tokens * sizes.row // sizes.ranks
    places = [sizes.heads]
    if sizes.has_rope:
        places.append(sizes.heads + 3 * head_video * 2 // sizes.width)
    kept = 0  # to the end
    if injects:
        branch, keys = sizes.heads // sizes.batch, head_video // sizes.batch
        groups = 2 * sizes.injected * keys
        before = (sizes.batch - 1) * branch  # what the other branch gave
        rotated = 2 * branch + keys if sizes.has_rope else 0
        places.append(before + groups + rotated + 3 * branch + 4 * keys)
        kept = groups + sizes.heads
    if sizes.ranks > 1:
        has_pads = layout.rank_tokens(sizes.ranks) * sizes.ranks != layout.video_tokens
        copies = 3 + (layout.text_tokens > 0) + has_pads
        places.append(kept + sizes.heads + copies * sizes.own_video)
    return own + max(places)


def _matching_bytes(sizes: _Sizes, matching: Matching) -> int:
    """Bytes of `match_tokens` at its peak.

    All layers of the frame video's character, one layer
    of the identity video as it is, in fp32 and normed, and three products of a chunk.

    Within the foreground the character's features are there in fp32 too, and of the identity
    video only its character.
    """
    layout, wide = sizes.layout, 4 / sizes.width
    is_foreground = matching.within == "foreground"
    own_character = _CHARACTER_SHARE * layout.rank_tokens(sizes.ranks) * sizes.row
    frame = len(matching.layers) * own_character * (1 + wide * is_foreground)
    rows = layout.video_tokens * (_CHARACTER_SHARE if is_foreground else 1)
    identity = rows * sizes.row * (1 + 2 * wide)
    return int(frame + identity + 3 * 4 * _MATCH_CHUNK * rows)


# --- decoding -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Decoder:
    """How the autoencoder of a family decodes. Sizes in pixels; `stride` is that of its tiles.

    Smaller videos than `tiled_from` are decoded whole, as the adapters say.
    `values`: in memory at its peak, for each pixel of a tile, beside the frames; measured in the
    published autoencoder, whose layers at full resolution have `channels`. A test measures again.
    """

    values: int
    channels: int
    tiled_from: int
    tile: tuple[int, int]
    stride: tuple[int, int]


DECODERS: Mapping[Family, _Decoder] = {
    "cogvideox": _Decoder(22_890, 128, 320 * 480, (240, 360), (200, 288)),
    "wan": _Decoder(4_897, 96, 480 * 832 + 1, (256, 256), (192, 192)),
}


def _decode_bytes(config: ResolvedConfig, facts: ModelFacts) -> int:
    """Bytes of a decode at its peak: in the last tile, or when tiles become frames."""
    video, decoder = config.video, DECODERS[facts.family]
    width = 4 if facts.family == "wan" else DTYPE_BYTES[config.model.dtype]
    values = decoder.values * facts.vae_channels // decoder.channels
    frames = 3 * video.pixel_frames * video.height * video.width
    to_bytes = frames * (width + 3 * 4)  # `to_frames`: in fp32, scaled, rounded
    if video.height * video.width < decoder.tiled_from:
        return max(values * video.height * video.width * width + frames * width, to_bytes)
    sizes = zip((video.height, video.width), decoder.tile, decoder.stride, strict=True)
    rows, columns = (
        sum(min(tile, size - start) for start in range(0, size, stride))
        for size, tile, stride in sizes
    )
    tiles = 3 * video.pixel_frames * rows * columns
    pixels = min(decoder.tile[0], video.height) * min(decoder.tile[1], video.width)
    # Tiles, their blended rows, the frames, and the frames within bounds.
    return max(values * pixels * width + frames * width, (tiles + 3 * frames) * width, to_bytes)
