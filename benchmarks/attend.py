"""What injected attention costs, as a multiple of plain attention over the same video.

    python benchmarks/attend.py

One layer of CogVideoX-5b, one branch: its full size on a GPU, fewer heads and a smaller grid on a
CPU. A fifth of the tokens is character, in the frame video and, elsewhere, in the identity video.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bachvid.attention.attend import attend
from bachvid.attention.control import QKV, KVGroup
from bachvid.attention.rotary import Rotary
from bachvid.layout.tokens import TokenLayout

HEAD_DIM = 64
REPEATS = 7


def build_groups(layout: TokenLayout, identity: QKV) -> list[KVGroup]:
    """Return the character, and what is background in both videos, the identity's keys."""
    _, height, width = layout.grid
    frame_mask = torch.zeros(layout.grid, dtype=torch.bool)
    identity_mask = frame_mask.clone()
    box = slice(height // 4, height - height // 4)  # half the height, two fifths of the width
    frame_mask[:, box, : width * 2 // 5] = True
    identity_mask[:, box, width - width * 2 // 5 :] = True
    foreground = frame_mask.flatten().nonzero()[:, 0]
    matches = identity_mask.flatten().nonzero()[:, 0]
    background = (~(frame_mask | identity_mask)).flatten().nonzero()[:, 0]
    groups = []
    for positions, sources in ((foreground, matches), (background, background)):
        positions = positions.to(identity.key_BSHD.device)
        groups.append(
            KVGroup(
                query_rows_Q=positions + layout.text_tokens,
                key_BMHD=identity.key_BSHD[:, sources + layout.text_tokens],
                value_BMHD=identity.value_BSHD[:, sources + layout.text_tokens],
                positions_M=positions,
            )
        )
    return groups


def attend_with_mask(
    qkv: QKV, groups: list[KVGroup], rotary: Rotary, layout: TokenLayout
) -> Tensor:
    """Do the same in one call, with a mask of all queries by all keys."""
    rotated = [rotary.rotate(group.key_BMHD, group.positions_M) for group in groups]
    key_BSHD = torch.cat([rotary.rotate_joint(qkv.key_BSHD, layout), *rotated], dim=1)
    value_BSHD = torch.cat([qkv.value_BSHD, *(group.value_BMHD for group in groups)], dim=1)
    num_rows, num_keys = layout.joint_tokens, key_BSHD.shape[1]
    mask = torch.zeros(num_rows, num_keys, dtype=torch.bool, device=key_BSHD.device)
    mask[:, :num_rows] = True
    start = num_rows
    for group in groups:
        stop = start + len(group.positions_M)
        mask[group.query_rows_Q, start:stop] = True
        start = stop
    out_BHSD = F.scaled_dot_product_attention(
        rotary.rotate_joint(qkv.query_BSHD, layout).transpose(1, 2),
        key_BSHD.transpose(1, 2),
        value_BSHD.transpose(1, 2),
        attn_mask=mask,
    )
    return out_BHSD.transpose(1, 2)


def measure_seconds(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Time the calls in turn, so that a busy machine slows all of them; keep the best of each."""
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(REPEATS):
        for name, call in calls.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Print each way's time over that of plain attention."""
    torch.manual_seed(0)
    has_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    layout = TokenLayout(226, 13, 30, 45) if has_gpu else TokenLayout(226, 5, 15, 22)
    num_heads = 48 if has_gpu else 4
    shape = (1, layout.joint_tokens, num_heads, HEAD_DIM)
    qkv, identity = (
        QKV(*(torch.randn(shape, device=device, dtype=dtype) for _ in range(3))) for _ in range(2)
    )
    angles = torch.rand(layout.video_tokens, HEAD_DIM // 2, device=device).repeat_interleave(2, 1)
    rotary = Rotary(angles.cos(), angles.sin())
    groups = build_groups(layout, identity)

    calls: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: attend(qkv, (), rotary, layout),
        "query split": lambda: attend(qkv, groups, rotary, layout),
        "dense mask": lambda: attend_with_mask(qkv, groups, rotary, layout),
    }
    difference = (calls["query split"]() - calls["dense mask"]()).abs().max().item()
    seconds = measure_seconds(calls)
    pairs = sum(len(group.query_rows_Q) * len(group.positions_M) for group in groups)
    print(f"{layout.joint_tokens} tokens, {num_heads} heads x {HEAD_DIM}, {dtype} on {device}")
    print(f"query-key pairs   {1 + pairs / layout.joint_tokens**2:.2f} x plain")
    for name, value in seconds.items():
        print(f"{name:<17} {value / seconds['plain']:.2f} x plain  ({value:.4f} s)")
    print(f"largest difference between query split and dense mask: {difference:.1e}")


if __name__ == "__main__":
    main()
