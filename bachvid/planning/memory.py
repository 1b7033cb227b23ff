"""Predicts the peak GPU memory of a rank before any weight is loaded.

Pure: no torch. Only tensors are counted, as in `torch.cuda.max_memory_allocated`: the CUDA context,
the reserve of the allocator and the workspaces of convolutions come on top. Attention is expected
to run in PyTorch's fused kernels, which make no matrix of queries by keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.files import read_component_sizes
from bachvid.inputs.choices import DTYPE_BYTES, Dtype, Offload
from bachvid.layout.gangs import Gang
from bachvid.layout.tokens import TokenLayout
from bachvid.methods.base import Matching, Method
from bachvid.planning.config import ResolvedConfig

# Share of the tokens that is character when tokens are matched: the paper's largest.
_CHARACTER_SHARE = 0.3
_MATCH_CHUNK = 1024  # query rows at once, of `match_tokens`


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of the components of a model, in the dtypes in which they are loaded."""

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

    weights: None if the weights are not on this machine and the model is not a published one.
    forward: activations of the transformer, in the step that needs most.
    matching: features and their products, once for each frame video, between two steps.
    decode: activations of the VAE and the frames, on a rank that decodes alone. Ranks that share
        a decode need less.
    """

    weights: WeightBytes | None
    forward: int
    matching: int
    decode: int

    def phases(self, offload: Offload) -> PhaseBytes | None:
        """Add up what is held in each phase; None if the weights are not known.

        With `offload` only the component in use is on the GPU. The text encoder is freed before the
        first video; its activations are small and not counted.
        """
        weights = self.weights
        if weights is None:
            return None
        both = weights.transformer + weights.vae if offload == "none" else 0
        return PhaseBytes(
            encoding=both + weights.text_encoder,
            denoising=(both or weights.transformer) + max(self.forward, self.matching),
            decoding=(both or weights.vae) + self.decode,
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
    """Return the peak bytes of a render by these gangs."""
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
    """Return what a rank of `gang` needs, for frame videos too if it renders them."""
    injects = renders_frames and any(run.reads for run in method.runs("frame"))
    sizes = _Sizes.of(config, facts, method, gang)
    return RankMemory(
        weights=weight_bytes(facts, config.model.dtype),
        forward=_forward_bytes(sizes, facts, injects=injects),
        matching=_matching_bytes(sizes, method.matching) if injects and method.matching else 0,
        decode=_decode_bytes(config, facts),
    )


# --- weights ------------------------------------------------------------------------------------


def weight_bytes(facts: ModelFacts, dtype: Dtype) -> WeightBytes | None:
    """Return the bytes of a model's weights, in the dtypes in which its family loads them.

    None if its files are not on this machine and it is not a published model. Raises
    ModelSupportError for a damaged file.
    """
    components, sizes = facts.traits.components, facts.sizes
    if facts.folder is not None:
        words = {name: traits.fp32_words for name, traits in components.items()}
        sizes = read_component_sizes(facts.folder, words)
    if sizes is None:
        return None
    nbytes = {
        name: sizes[name].nbytes(
            DTYPE_BYTES[traits.dtype(dtype)], keeps_fp32=dtype in traits.fp32_in
        )
        for name, traits in components.items()
    }
    return WeightBytes(nbytes["transformer"], nbytes["vae"], nbytes["text_encoder"])


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
    table: int  # of the cosines and sines of all video rows, in fp32
    has_rope: bool

    @classmethod
    def of(
        cls, config: ResolvedConfig, facts: ModelFacts, method: Method[Any], gang: Gang
    ) -> _Sizes:
        width, layout = DTYPE_BYTES[config.model.dtype], facts.layout(config.video)
        is_whole = config.sampling.guidance_scale > 1 and gang.cfg == 1
        batch = max(len(branches) for branches in facts.passes) if is_whole else 1
        return cls(
            layout=layout,
            ranks=gang.sequence,
            width=width,
            batch=batch,
            injected=min(batch, max(len(method.records.branches), 1)),
            row=facts.num_heads * facts.head_dim * width,
            inner_row=facts.ffn_dim * width,
            table=2 * 4 * layout.video_tokens * facts.head_dim,
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
    """Bytes of a forward at its peak, without the weights; tables of positions are included.

    Each line is a place where diffusers' eager code is at its fullest. In a feed-forward a block
    holds its own hidden states, what attention gave, the normed states, and the inner states
    before and after the activation. A family that adds in fp32 has both terms and a product in it.
    Behind the blocks whole videos are normed and shifted, one tensor each, there too in fp32.
    """
    video = sizes.batch * sizes.layout.video_tokens * sizes.row
    places = [
        sizes.held + 3 * sizes.own + 2 * sizes.own_rows * sizes.inner_row,
        sizes.held + _attention_bytes(sizes, injects=injects),
    ]
    if facts.traits.adds_in_fp32:
        wide = 4 * sizes.own // sizes.width
        gathered = 4 * video // sizes.width
        places.append(sizes.held + 4 * sizes.own + 3 * wide)
        places.append(sizes.own + wide + (2 if sizes.ranks > 1 else 1) * gathered)
    else:
        places.append(3 * video)
    if facts.has_rope:
        tables = sizes.table * (2 if facts.traits.makes_rotary else 1)
    else:  # added once to every row, kept in fp64
        tables = 8 * sizes.layout.joint_tokens * sizes.row // sizes.width
    return max(places) + tables


def _attention_bytes(sizes: _Sizes, *, injects: bool) -> int:
    """Bytes of the self-attention at its peak, beyond those of the forward.

    The normed states, and queries, keys and values of a rank's rows; with several ranks also
    those of its heads (`controlled_attention`). Then one of three: the keys are rotated, beside
    the rotated queries, by two products in fp32 (`Rotary.rotate`); one branch attends with groups
    (`attend`), beside the keys and values of all groups of all branches: its queries rotated, its
    keys and values with room for the longest group, its results, and either a group's keys being
    rotated, with their rows of the table, or a group's queries and results once more; or the
    results go back to the rows in two copies, the text cut off and pads added before
    (`JoinedGroup.to_tokens`). No story injects more than one key for every video row, in one
    group, so that is counted.
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
        buffers = 2 * (branch + keys) + branch
        rotating = 2 * keys
        if sizes.has_rope:
            rotating = branch + max(3 * keys * 2 // sizes.width + sizes.table, 2 * keys)
        places.append(before + groups + buffers + rotating)
        kept = groups
    if sizes.ranks > 1:
        has_pads = layout.rank_tokens(sizes.ranks) * sizes.ranks != layout.video_tokens
        copies = 2 + (layout.text_tokens > 0) + has_pads
        places.append(kept + sizes.heads + copies * sizes.own_video)
    return own + max(places)


def _matching_bytes(sizes: _Sizes, matching: Matching) -> int:
    """Bytes of `match_tokens` at its peak.

    All layers of the frame video's character, one layer of the identity video as it is, in fp32
    and normed, and three products of a chunk. Within the foreground the character's features are
    there in fp32 too, and of the identity video only its character.
    """
    layout, wide = sizes.layout, 4 / sizes.width
    is_foreground = matching.within == "foreground"
    own_character = _CHARACTER_SHARE * layout.rank_tokens(sizes.ranks) * sizes.row
    frame = len(matching.layers) * own_character * (1 + wide * is_foreground)
    rows = layout.video_tokens * (_CHARACTER_SHARE if is_foreground else 1)
    identity = rows * sizes.row * (1 + 2 * wide)
    return int(frame + identity + 3 * 4 * _MATCH_CHUNK * rows)


# --- decoding -----------------------------------------------------------------------------------


def _decode_bytes(config: ResolvedConfig, facts: ModelFacts) -> int:
    """Bytes of a decode at its peak: in the last tile, or when tiles become frames."""
    video, decoder = config.video, facts.traits.decoder
    width = DTYPE_BYTES[facts.traits.components["vae"].dtype(config.model.dtype)]
    values = decoder.values * facts.vae_channels // decoder.channels
    frames = 3 * video.pixel_frames * video.height * video.width
    to_bytes = frames * (width + 3 * 4)  # in fp32, scaled, rounded
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
