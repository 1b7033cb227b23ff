"""What recording and injecting cost one layer of each model, as multiples of the plain layer.

    python benchmarks/layer.py                 # on a GPU: real sizes, bf16, random weights
    python benchmarks/layer.py --size tiny     # anywhere: that it runs, not what it costs

A layer runs all branches of a forward, and both are recorded or injected. A fifth of the tokens is
character, in the frame video and, elsewhere, in the identity video. Recorded keys and values go
into a packed step in pinned memory; injected ones come from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click
import torch
from attend import attend_with_mask, build_groups, measure_seconds
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from bachvid.attention.attend import attend
from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionControl, KVGroup
from bachvid.attention.rotary import Rotary
from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.registry import published_models
from bachvid.kv.cache import Shard
from bachvid.kv.packing import StepPacker
from bachvid.layout.gangs import BRANCHES, Gang
from bachvid.layout.records import AttentionSite, Records, RecordSet
from bachvid.layout.tokens import TokenLayout
from bachvid.methods.ops.injection import InjectedTokens, inject_identity_kv
from bachvid.models.cogvideox import CogVideoXControlledProcessor
from bachvid.models.wan import WanCrossAttention, WanSelfAttention

MODELS = (
    "THUDM/CogVideoX-2b",
    "THUDM/CogVideoX-5b",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers",
)


class Recorder(AttentionControl):
    """Packs the keys and values of the layer, as an identity video of a cluster does."""

    def __init__(self, layout: TokenLayout, num_heads: int, branches: Sequence[str]) -> None:
        own = tuple(branch for branch in BRANCHES if branch in branches)
        self._rows = layout.video_rows
        self._last = AttentionSite(0, 0, own[-1])
        self._packer = StepPacker(
            share=Gang().share(0, num_heads),
            records=Records((RecordSet(("key", "value"), (0,), (0,), own),)),
            config_hash="",
        )

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        """Put the video rows, and take the step when it is whole."""
        key_BMHD, value_BMHD = qkv.key_BSHD[:, self._rows], qkv.value_BSHD[:, self._rows]
        self._packer.put(Shard(site, {"key": key_BMHD.clone(), "value": value_BMHD.clone()}))
        if site == self._last:
            self._packer.take(0)
        return qkv


class Injector(AttentionControl):
    """Injects keys and values that lie in pinned memory."""

    def __init__(self, key_BMHD: Tensor, tokens: InjectedTokens) -> None:
        self._tokens = tokens
        self._key_BMHD = key_BMHD

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        """Return character and background their keys."""
        shard = Shard(site, {"key": self._key_BMHD, "value": self._key_BMHD})
        return inject_identity_kv(shard, self._tokens)


def build_layer(
    facts: ModelFacts, run: RunContext, heads: int, device: torch.device, dtype: torch.dtype
) -> Callable[[AttentionControl | None], Tensor]:
    """Return a function that runs one layer under a control; None is diffusers' own."""
    layout, batch = run.layout, len(run.branches)
    channels = heads * facts.head_dim

    def states(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=dtype)

    video, rotary = states(layout.video_tokens, channels), run.rotary
    given: dict[str, Tensor | tuple[Tensor, ...] | None]
    table = (
        None if rotary.cos_ND is None or rotary.sin_ND is None else (rotary.cos_ND, rotary.sin_ND)
    )
    if facts.family == "cogvideox":
        block = CogVideoXBlock(channels, heads, facts.head_dim, time_embed_dim=512)
        given = {
            "encoder_hidden_states": states(layout.text_tokens, channels),
            "temb": states(512),
            "image_rotary_emb": table,
        }
    else:
        assert table is not None
        ffn = facts.ffn_dim * heads // facts.num_heads
        block = WanTransformerBlock(channels, ffn, heads, cross_attn_norm=True)
        given = {
            "encoder_hidden_states": states(facts.text_tokens, channels),
            "temb": states(6, channels),
            "rotary_emb": tuple(x[None, :, None] for x in table),
        }
    block.to(device, dtype).eval()
    for name, parameter in block.named_parameters():
        if facts.family == "wan" and {"norm2", "scale_shift_table"} & set(name.split(".")):
            parameter.data = parameter.data.float()  # as diffusers loads it
    stock = {
        name: getattr(block, name).processor for name in ("attn1", "attn2") if hasattr(block, name)
    }

    @torch.no_grad()
    def call(control: AttentionControl | None) -> Tensor:
        processors = stock
        if control is not None and facts.family == "cogvideox":
            processors = {"attn1": CogVideoXControlledProcessor(0, run, control)}
        elif control is not None:
            processors = {
                "attn1": WanSelfAttention(0, run, control),
                "attn2": WanCrossAttention(0, run, control),
            }
        for name, processor in processors.items():
            getattr(block, name).set_processor(processor)
        out: Tensor | tuple[Tensor, Tensor] = block(video, **given)
        return out[0] if isinstance(out, tuple) else out

    return call


def measure(facts: ModelFacts, *, is_tiny: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Print the ratios of one model."""
    defaults = facts.defaults
    grid = facts.grid(defaults.pixel_frames, defaults.height, defaults.width)
    layout = TokenLayout(facts.joint_text_tokens, *((3, 8, 10) if is_tiny else grid))
    heads = 2 if is_tiny else facts.num_heads
    rotary = Rotary.none()
    if facts.has_rope:
        angles = torch.rand(layout.video_tokens, facts.head_dim // 2, device=device)
        angles = angles.repeat_interleave(2, 1)
        rotary = Rotary(angles.cos(), angles.sin())
    run = RunContext(layout, rotary, branches=facts.passes[0])
    shape = (1, layout.joint_tokens, heads, facts.head_dim)
    qkv, identity = (
        QKV(*(torch.randn(shape, device=device, dtype=dtype) for _ in range(3))) for _ in range(2)
    )
    groups = build_groups(layout, identity)
    foreground, background = (group.positions_M for group in groups)
    tokens = InjectedTokens(
        foreground_rows_Q=foreground + layout.text_tokens,
        foreground_positions_Q=foreground,
        identity_index_Q=foreground,
        background_rows_Q=background + layout.text_tokens,
        background_positions_Q=background,
    )
    key_BMHD = identity.key_BSHD[:, layout.video_rows].cpu()
    if device.type == "cuda":
        key_BMHD = key_BMHD.pin_memory()
    layer = build_layer(facts, run, heads, device, dtype)
    recorder, injector = Recorder(layout, heads, run.branches), Injector(key_BMHD, tokens)
    seconds = measure_seconds(
        {
            "diffusers' own": lambda: layer(None),
            "plain": lambda: layer(AttentionControl()),
            "recorded": lambda: layer(recorder),
            "injected": lambda: layer(injector),
        }
    )
    attention = measure_seconds(
        {
            "query split": lambda: attend(qkv, groups, rotary, layout),
            "dense mask": lambda: attend_with_mask(qkv, groups, rotary, layout),
        }
    )
    print(f"{facts.name}: {layout.joint_tokens} tokens, {heads} heads x {facts.head_dim}")
    for name, value in seconds.items():
        print(f"  {name:<15} {value / seconds['plain']:.2f} x plain  ({value * 1e3:.1f} ms)")
    ratio = attention["dense mask"] / attention["query split"]
    print(f"  attention with a dense mask: {ratio:.2f} x the query split")


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(["real", "tiny"]), default="real")
def main(size: str) -> None:
    """Measure every model."""
    has_gpu = torch.cuda.is_available()
    if size == "real" and not has_gpu:
        raise click.UsageError(
            "a layer of real size takes minutes and gigabytes on a CPU, and its ratios say nothing "
            "about a GPU: run this where torch sees a CUDA GPU, or pass --size tiny"
        )
    torch.manual_seed(0)
    device = torch.device("cuda" if has_gpu else "cpu")
    dtype = torch.bfloat16 if has_gpu else torch.float32
    print(f"{dtype} on {torch.cuda.get_device_name(device) if has_gpu else 'cpu'}, size {size}")
    for model_id in MODELS:
        measure(published_models()[model_id], is_tiny=size == "tiny", device=device, dtype=dtype)


if __name__ == "__main__":
    main()
