from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from torch import Tensor

from bachvid.attention.attend import attend, controlled_attention, controlled_cross_attention
from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionControl, AttentionSite, KVGroup
from bachvid.attention.rotary import Rotary
from bachvid.errors import LayoutError
from bachvid.layout.tokens import TokenLayout

LAYOUT = TokenLayout(text_tokens=5, latent_frames=2, grid_height=4, grid_width=3)
HEADS, WIDTH = 3, 16


def rotary_of(layout: TokenLayout) -> Rotary:
    height, width = layout.grid_height, layout.grid_width
    cos_ND, sin_ND = get_3d_rotary_pos_embed(
        WIDTH, ((0, 0), (height, width)), (height, width), layout.latent_frames, use_real=True
    )
    return Rotary(cos_ND, sin_ND)


def random_qkv(seed: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> QKV:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, LAYOUT.joint_tokens, HEADS, WIDTH)
    return QKV(*(torch.randn(shape, generator=generator).to(dtype) for _ in range(3)))


def random_group(seed: int, rows: list[int], positions: list[int]) -> KVGroup:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, len(positions), HEADS, WIDTH)
    key, value = (torch.randn(shape, generator=generator) for _ in range(2))
    return KVGroup(
        torch.tensor(rows, dtype=torch.int64),
        key,
        value,
        torch.tensor(positions, dtype=torch.int64),
    )


def stock_attention(qkv: QKV, rotary: Rotary) -> Tensor:
    """What diffusers' CogVideoX processor computes, in its own layout."""
    query, key, value = (x.transpose(1, 2).contiguous() for x in qkv)
    if rotary.cos_ND is not None:
        table = (rotary.cos_ND, rotary.sin_ND)
        for x in (query, key):
            x[:, :, LAYOUT.text_tokens :] = apply_rotary_emb(x[:, :, LAYOUT.text_tokens :], table)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def dense_attention(qkv: QKV, groups: list[KVGroup], rotary: Rotary) -> Tensor:
    """Eq. (14) as written: every key in one sequence, a dense mask of who sees whom; float64."""
    keys = [rotary.rotate_joint(qkv.key_BSHD, LAYOUT)]
    keys += [rotary.rotate(group.key_BMHD, group.positions_M) for group in groups]
    values = [qkv.value_BSHD, *(group.value_BMHD for group in groups)]
    visible = [torch.ones(LAYOUT.joint_tokens, LAYOUT.joint_tokens, dtype=torch.bool)]
    for group in groups:
        sees = torch.zeros(LAYOUT.joint_tokens, group.key_BMHD.shape[1], dtype=torch.bool)
        sees[group.query_rows_Q] = True
        visible.append(sees)
    query = rotary.rotate_joint(qkv.query_BSHD, LAYOUT)
    return F.scaled_dot_product_attention(
        query.double().transpose(1, 2),
        torch.cat(keys, dim=1).double().transpose(1, 2),
        torch.cat(values, dim=1).double().transpose(1, 2),
        attn_mask=torch.cat(visible, dim=1),
    ).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_equals_diffusers_bit_by_bit(dtype: torch.dtype) -> None:
    rotary = rotary_of(LAYOUT)
    video_BNHD = random_qkv(0, batch=2, dtype=dtype).query_BSHD[:, LAYOUT.video_rows]
    table = (rotary.cos_ND, rotary.sin_ND)
    expected = apply_rotary_emb(video_BNHD, table, sequence_dim=1)
    torch.testing.assert_close(rotary.rotate(video_BNHD), expected, rtol=0, atol=0)


def test_a_key_that_moves_is_rotated_with_its_new_position() -> None:
    rotary = rotary_of(LAYOUT)
    video_BNHD = random_qkv(0).key_BSHD[:, LAYOUT.video_rows]
    positions = torch.tensor([7, 0, 7])
    moved = rotary.rotate(video_BNHD[:, [2, 5, 9]], positions)
    elsewhere = torch.zeros_like(video_BNHD)
    elsewhere[:, 7], elsewhere[:, 0] = video_BNHD[:, 2], video_BNHD[:, 5]
    expected = rotary.rotate(elsewhere)
    torch.testing.assert_close(moved[:, 0], expected[:, 7], rtol=0, atol=0)
    torch.testing.assert_close(moved[:, 1], expected[:, 0], rtol=0, atol=0)


def test_without_rope_nothing_is_rotated() -> None:
    x = random_qkv(0).key_BSHD
    assert Rotary.none().rotate(x, torch.zeros(3, dtype=torch.int64)) is x
    assert Rotary.none().rotate_joint(x, LAYOUT) is x


def test_a_rotary_table_of_another_size_is_refused() -> None:
    with pytest.raises(LayoutError, match="29 tokens with a rotary table of 24 rows"):
        rotary_of(LAYOUT).rotate(random_qkv(0).key_BSHD)


@pytest.mark.parametrize("rotary", [rotary_of(LAYOUT), Rotary.none()], ids=["rope", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_groups_equals_diffusers_bit_by_bit(
    rotary: Rotary, dtype: torch.dtype
) -> None:
    qkv = random_qkv(1, batch=2, dtype=dtype)
    actual = attend(qkv, (), rotary, LAYOUT)
    torch.testing.assert_close(actual, stock_attention(qkv, rotary), rtol=0, atol=0)


@pytest.mark.parametrize("rotary", [rotary_of(LAYOUT), Rotary.none()], ids=["rope", "none"])
def test_attention_with_groups_equals_dense_masked_attention(rotary: Rotary) -> None:
    text, total = LAYOUT.text_tokens, LAYOUT.joint_tokens
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        kind_N = torch.randint(0, 3, (LAYOUT.video_tokens,), generator=generator)
        kind_N[kind_N == seed % 4] = 0  # for most seeds one of the sets is empty
        groups = []
        for kind in (1, 2):
            rows = (kind_N == kind).nonzero().flatten() + text
            keys = int(torch.randint(0, total, (), generator=generator))
            positions = torch.randint(0, LAYOUT.video_tokens, (keys,), generator=generator)
            groups.append(random_group(seed + 1000 * kind, rows.tolist(), positions.tolist()))
        qkv = random_qkv(seed)
        actual = attend(qkv, groups, rotary, LAYOUT)
        expected = dense_attention(qkv, groups, rotary)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_every_row_may_be_in_a_group() -> None:
    rotary, qkv = rotary_of(LAYOUT), random_qkv(3)
    groups = [
        random_group(1, list(range(10)), [0, 3]),
        random_group(2, list(range(10, LAYOUT.joint_tokens)), [5]),
    ]
    expected = dense_attention(qkv, groups, rotary)
    actual = attend(qkv, groups, rotary, LAYOUT)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "positions"), [([], [1, 2]), ([6, 7], [])])
def test_a_group_without_rows_or_without_keys_changes_nothing(
    rows: list[int], positions: list[int]
) -> None:
    rotary, qkv = rotary_of(LAYOUT), random_qkv(4)
    actual = attend(qkv, [random_group(5, rows, positions)], rotary, LAYOUT)
    torch.testing.assert_close(actual, attend(qkv, (), rotary, LAYOUT), rtol=0, atol=0)


def test_rows_outside_every_group_are_untouched() -> None:
    rotary, qkv = rotary_of(LAYOUT), random_qkv(6)
    changed = attend(qkv, [random_group(7, [9, 11], [0, 1, 2])], rotary, LAYOUT)
    plain = attend(qkv, (), rotary, LAYOUT)
    rows_differ = (changed - plain).abs().amax(dim=(0, 2, 3)) > 1e-5
    assert rows_differ.nonzero().flatten().tolist() == [9, 11]


def test_three_groups_and_a_wrong_length_are_refused() -> None:
    groups = [random_group(i, [6 + i], [0]) for i in range(3)]
    with pytest.raises(LayoutError, match="3 key groups at one site"):
        attend(random_qkv(0), groups, rotary_of(LAYOUT), LAYOUT)
    longer = TokenLayout(6, 2, 4, 3)
    with pytest.raises(LayoutError, match=r"29 tokens, but the layout .* has 30"):
        attend(random_qkv(0), (), rotary_of(LAYOUT), longer)


class Spy(AttentionControl):
    """Notes what it is shown; optionally injects into one branch."""

    def __init__(self, groups: dict[str, list[KVGroup]]) -> None:
        self.groups = groups
        self.calls: list[tuple[str, AttentionSite]] = []
        self.queries: dict[str, Tensor] = {}

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        self.calls.append(("before", site))
        self.queries[site.branch] = qkv.query_BSHD
        return qkv

    def extra(self, site: AttentionSite, qkv: QKV) -> list[KVGroup]:
        self.calls.append(("extra", site))
        return self.groups.get(site.branch, [])

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        self.calls.append(("after", site))
        return out_BSC


def test_a_control_sees_each_branch_with_its_own_site_and_rows() -> None:
    run = RunContext(LAYOUT, rotary_of(LAYOUT), step=4)
    spy, qkv = Spy({}), random_qkv(8, batch=2)
    out_BSC = controlled_attention(run, spy, 7, qkv)
    uncond, cond = AttentionSite(4, 7, "uncond"), AttentionSite(4, 7, "cond")
    assert spy.calls == [(name, s) for name in ("before", "extra", "after") for s in (uncond, cond)]
    assert torch.equal(spy.queries["uncond"], qkv.query_BSHD[:1])
    assert torch.equal(spy.queries["cond"], qkv.query_BSHD[1:])
    expected = stock_attention(qkv, run.rotary).flatten(2)
    torch.testing.assert_close(out_BSC, expected, rtol=0, atol=0)


def test_groups_of_one_branch_leave_the_other_alone() -> None:
    run = RunContext(LAYOUT, rotary_of(LAYOUT))
    group, qkv = random_group(9, [6, 8, 10], [1, 2]), random_qkv(10, batch=2)
    out_BSC = controlled_attention(run, Spy({"cond": [group]}), 0, qkv)
    plain = stock_attention(qkv, run.rotary).flatten(2)
    torch.testing.assert_close(out_BSC[0], plain[0], rtol=1e-6, atol=1e-6)
    cond = QKV(*(x[1:] for x in qkv))
    expected = dense_attention(cond, [group], run.rotary).flatten(2)
    torch.testing.assert_close(out_BSC[1:].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_control_may_replace_values_and_outputs() -> None:
    class Silencer(AttentionControl):
        def before(self, site: AttentionSite, qkv: QKV) -> QKV:
            return qkv._replace(value_BSHD=qkv.value_BSHD * 2) if site.branch == "cond" else qkv

        def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
            return -out_BSC if site.branch == "uncond" else out_BSC

    run = RunContext(LAYOUT, rotary_of(LAYOUT))
    qkv = random_qkv(11, batch=2)
    plain = stock_attention(qkv, run.rotary).flatten(2)
    out_BSC = controlled_attention(run, Silencer(), 0, qkv)
    torch.testing.assert_close(out_BSC, torch.stack([-plain[0], 2 * plain[1]]))


def test_a_batch_that_does_not_divide_into_the_branches_is_refused() -> None:
    run = RunContext(LAYOUT, rotary_of(LAYOUT))
    with pytest.raises(LayoutError, match="a batch of 3 rows does not divide"):
        controlled_attention(run, AttentionControl(), 0, random_qkv(0, batch=3))


def test_a_single_branch_is_the_whole_batch() -> None:
    run = RunContext(LAYOUT, rotary_of(LAYOUT), branches=("cond",))
    spy, qkv = Spy({}), random_qkv(12, batch=2)
    controlled_attention(run, spy, 0, qkv)
    assert torch.equal(spy.queries["cond"], qkv.query_BSHD)


def test_attention_to_the_text_is_plain_and_shown_to_the_control_by_branch() -> None:
    class Watcher(AttentionControl):
        def __init__(self) -> None:
            self.seen: dict[AttentionSite, tuple[Tensor, Tensor]] = {}

        def cross(self, site: AttentionSite, query_BSHD: Tensor, key_BTHD: Tensor) -> None:
            self.seen[site] = query_BSHD, key_BTHD

    run, watcher = RunContext(LAYOUT, rotary_of(LAYOUT), step=2), Watcher()
    query, key, value = random_qkv(13, batch=2)
    query, key, value = query[:, LAYOUT.video_rows], key[:, :7], value[:, :7]
    out_BSC = controlled_cross_attention(run, watcher, 5, query, key, value)
    heads = [x.transpose(1, 2) for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    assert torch.equal(out_BSC, expected)
    for i, branch in enumerate(("uncond", "cond")):
        shown = watcher.seen[AttentionSite(2, 5, branch)]
        assert torch.equal(shown[0], query[i : i + 1])
        assert torch.equal(shown[1], key[i : i + 1])
