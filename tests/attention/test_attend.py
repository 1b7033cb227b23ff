"""Attention under a control, against what diffusers computes and against dense masks in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bachvid.attention.attend import attend, controlled_attention, controlled_cross_attention
from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionControl, KVGroup
from bachvid.attention.rotary import Rotary
from bachvid.errors import LayoutError
from bachvid.layout.gangs import Branch
from bachvid.layout.records import AttentionSite
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


def random_group(
    seed: int, rows: Sequence[int], positions: Sequence[int], batch: int = 1
) -> KVGroup:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, len(positions), HEADS, WIDTH)
    key, value = (torch.randn(shape, generator=generator) for _ in range(2))
    return KVGroup(
        torch.tensor(rows, dtype=torch.int64),
        key,
        value,
        torch.tensor(positions, dtype=torch.int64),
    )


def random_groups(seed: int, count: int, batch: int) -> list[KVGroup]:
    """Deal the joint rows, text too, to `count` groups and to none; some of them get no key."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, number: int) -> list[int]:
        drawn: list[int] = torch.randint(high, (number,), generator=generator).tolist()
        return drawn

    owners = draw(count + 1, LAYOUT.joint_tokens)
    return [
        random_group(
            1000 * seed + i,
            [row for row, owner in enumerate(owners) if owner == i],
            draw(LAYOUT.video_tokens, draw(LAYOUT.joint_tokens, 1)[0] if (seed + i) % 5 else 0),
            batch,
        )
        for i in range(count)
    ]


class Calls(TorchFunctionMode):
    """Notes the functions of torch that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Callable[..., Any]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        self.made.append(func)
        return func(*args, **(kwargs or {}))

    @property
    def num_attentions(self) -> int:
        return self.made.count(F.scaled_dot_product_attention)


def stock_attention(qkv: QKV, rotary: Rotary) -> Tensor:
    """What diffusers' CogVideoX processor computes, in its own layout."""
    query, key, value = (x.transpose(1, 2).contiguous() for x in qkv)
    if rotary.cos_ND is not None:
        table = (rotary.cos_ND, rotary.sin_ND)
        for x in (query, key):
            x[:, :, LAYOUT.text_tokens :] = apply_rotary_emb(x[:, :, LAYOUT.text_tokens :], table)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def dense_attention(qkv: QKV, groups: Sequence[KVGroup], rotary: Rotary) -> Tensor:
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


def assert_dense(actual: Tensor, qkv: QKV, groups: Sequence[KVGroup], rotary: Rotary) -> None:
    expected = dense_attention(qkv, groups, rotary)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rotary", [rotary_of(LAYOUT), Rotary.none()], ids=["rope", "none"])
@pytest.mark.parametrize("count", range(22))
def test_attention_with_any_number_of_groups_equals_dense_masked_attention(
    count: int, rotary: Rotary
) -> None:
    for seed in range(6):
        batch = 1 + seed % 2
        qkv, groups = random_qkv(seed, batch), random_groups(seed, count, batch)
        assert_dense(attend(qkv, groups, rotary, LAYOUT), qkv, groups, rotary)


def test_every_row_may_be_in_a_group() -> None:
    rotary, qkv = rotary_of(LAYOUT), random_qkv(3)
    groups = [
        random_group(1, range(10), [0, 3, 3]),
        random_group(2, range(11, LAYOUT.joint_tokens), [5]),
        random_group(3, [10], range(LAYOUT.video_tokens)),
    ]
    assert_dense(attend(qkv, groups, rotary, LAYOUT), qkv, groups, rotary)


def test_one_row_may_see_one_key() -> None:
    rotary, qkv = rotary_of(LAYOUT), random_qkv(3)
    groups = [random_group(1, [8], [4])]
    assert_dense(attend(qkv, groups, rotary, LAYOUT), qkv, groups, rotary)


def test_a_short_group_does_not_see_the_keys_of_a_long_one() -> None:
    rotary, qkv = rotary_of(LAYOUT), random_qkv(3)
    short = random_group(1, [6, 7], [4])
    longer = [random_group(i, [8 + i], range(20)) for i in range(2)]
    out_BSHD = attend(qkv, [longer[0], short, longer[1]], rotary, LAYOUT)
    alone_BSHD = attend(qkv, [short], rotary, LAYOUT)
    torch.testing.assert_close(out_BSHD[:, 6:8], alone_BSHD[:, 6:8], rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "positions"), [([], [1, 2]), ([6, 7], []), ([], [])])
def test_groups_without_rows_or_without_keys_change_nothing(
    rows: list[int], positions: list[int]
) -> None:
    rotary, qkv = rotary_of(LAYOUT), random_qkv(4)
    empty, used = random_group(5, rows, positions), random_group(6, [6, 9], [1, 2, 3])
    with Calls() as calls:
        actual = attend(qkv, [empty, empty], rotary, LAYOUT)
    assert calls.num_attentions == 1
    torch.testing.assert_close(actual, attend(qkv, (), rotary, LAYOUT), rtol=0, atol=0)
    actual = attend(qkv, [empty, used, empty], rotary, LAYOUT)
    torch.testing.assert_close(actual, attend(qkv, [used], rotary, LAYOUT), rtol=0, atol=0)


def test_rows_outside_every_group_are_untouched() -> None:
    rotary, qkv = rotary_of(LAYOUT), random_qkv(6)
    changed = attend(qkv, [random_group(7, [9, 11], [0, 1, 2])], rotary, LAYOUT)
    plain = attend(qkv, (), rotary, LAYOUT)
    rows_differ = (changed - plain).abs().amax(dim=(0, 2, 3)) > 1e-5
    assert rows_differ.nonzero().flatten().tolist() == [9, 11]


def test_what_is_attended_to_is_left_as_it_is() -> None:
    qkv, groups = random_qkv(6), random_groups(2, 3, batch=1)
    given = [*qkv, *(x for group in groups for x in (group.key_BMHD, group.value_BMHD))]
    copies = [x.clone() for x in given]
    attend(qkv, groups, Rotary.none(), LAYOUT)
    assert all(torch.equal(x, copy) for x, copy in zip(given, copies, strict=True))


@pytest.mark.parametrize("rows", [[[6, 7], [8, 7]], [[6, 6]], [range(20), range(20)]])
def test_rows_in_two_groups_are_refused(rows: list[list[int]]) -> None:
    groups = [random_group(i, part, [0]) for i, part in enumerate(rows)]
    with pytest.raises(LayoutError, match=r"query rows, some of them more than once"):
        attend(random_qkv(0), groups, rotary_of(LAYOUT), LAYOUT)


def test_a_sequence_of_another_length_is_refused() -> None:
    longer = TokenLayout(6, 2, 4, 3)
    with pytest.raises(LayoutError, match=r"29 tokens, but the layout .* has 30"):
        attend(random_qkv(0), (), rotary_of(LAYOUT), longer)


class Spy(AttentionControl):
    """Notes what it is shown; optionally injects into one branch."""

    def __init__(self, groups: Mapping[Branch, Sequence[KVGroup]]) -> None:
        self.groups = groups
        self.calls: list[tuple[str, AttentionSite]] = []
        self.queries: dict[Branch, Tensor] = {}
        self.mixed: dict[Branch, Tensor] = {}

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        self.calls.append(("before", site))
        self.queries[site.branch] = qkv.query_BSHD
        return qkv

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        self.calls.append(("extra", site))
        return self.groups.get(site.branch, ())

    def mix(self, site: AttentionSite, out_BSHD: Tensor) -> Tensor:
        self.calls.append(("mix", site))
        self.mixed[site.branch] = out_BSHD
        return out_BSHD

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        self.calls.append(("after", site))
        return out_BSC


def test_a_control_sees_each_branch_with_its_own_site_and_rows() -> None:
    run = RunContext(LAYOUT, rotary_of(LAYOUT), step=4)
    spy, qkv = Spy({}), random_qkv(8, batch=2)
    out_BSC = controlled_attention(run, spy, 7, qkv)
    uncond, cond = AttentionSite(4, 7, "uncond"), AttentionSite(4, 7, "cond")
    names = ("before", "extra", "mix", "after")
    assert spy.calls == [(name, site) for name in names for site in (uncond, cond)]
    expected = stock_attention(qkv, run.rotary)
    for i, branch in enumerate(run.branches):
        assert torch.equal(spy.queries[branch], qkv.query_BSHD[i : i + 1])
        assert torch.equal(spy.mixed[branch], expected[i : i + 1])
    torch.testing.assert_close(out_BSC, expected.flatten(2), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_control_that_changes_nothing_costs_one_plain_call(dtype: torch.dtype) -> None:
    run, qkv = RunContext(LAYOUT, Rotary.none()), random_qkv(8, batch=4, dtype=dtype)
    empty = [random_group(1, [], [3], batch=2), random_group(1, [3], [], batch=2)]
    expected = stock_attention(qkv, run.rotary).flatten(2)
    for control in (AttentionControl(), Spy({}), Spy({"cond": empty})):
        with Calls() as calls:
            out_BSC = controlled_attention(run, control, 0, qkv)
        assert calls.num_attentions == 1
        assert torch.cat not in calls.made
        torch.testing.assert_close(out_BSC, expected, rtol=0, atol=0)


def test_groups_of_one_branch_leave_the_other_alone() -> None:
    run = RunContext(LAYOUT, rotary_of(LAYOUT))
    group, qkv = random_group(9, [6, 8, 10], [1, 2]), random_qkv(10, batch=2)
    out_BSC = controlled_attention(run, Spy({"cond": [group]}), 0, qkv)
    plain = stock_attention(qkv, run.rotary).flatten(2)
    torch.testing.assert_close(out_BSC[0], plain[0], rtol=1e-6, atol=1e-6)
    assert_dense(
        out_BSC[1:].unflatten(2, (HEADS, WIDTH)),
        QKV(*(x[1:] for x in qkv)),
        [group],
        run.rotary,
    )


class Merger(AttentionControl):
    """Blends rows of the attention output of one branch with what was kept of another video."""

    def __init__(self, kept_BSHD: Tensor, groups: Sequence[KVGroup] = ()) -> None:
        self.kept_BSHD, self.groups = kept_BSHD, groups
        self.seen_BSC: dict[Branch, Tensor] = {}

    def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
        return self.groups if site.branch == "cond" else ()

    def mix(self, site: AttentionSite, out_BSHD: Tensor) -> Tensor:
        if site.branch == "uncond":
            return out_BSHD
        return torch.lerp(out_BSHD, self.kept_BSHD, 0.25)

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        self.seen_BSC[site.branch] = out_BSC
        return out_BSC


@pytest.mark.parametrize("injects", [False, True])
def test_what_attention_gave_may_be_mixed_by_branch(injects: bool) -> None:
    run, qkv = RunContext(LAYOUT, rotary_of(LAYOUT)), random_qkv(11, batch=4)
    groups = random_groups(3, 3, batch=2) if injects else []
    kept_BSHD = random_qkv(12, batch=2).value_BSHD
    merger = Merger(kept_BSHD, groups)
    plain = controlled_attention(run, Spy({"cond": groups}), 0, qkv)
    out_BSC = controlled_attention(run, merger, 0, qkv)
    torch.testing.assert_close(out_BSC[:2], plain[:2], rtol=0, atol=0)
    expected = torch.lerp(plain[2:], kept_BSHD.flatten(2), 0.25)
    torch.testing.assert_close(out_BSC[2:], expected, rtol=0, atol=0)
    assert torch.equal(merger.seen_BSC["cond"], expected)


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


def test_one_rank_gathers_by_changing_nothing() -> None:
    run, x_NC = RunContext(LAYOUT, Rotary.none()), torch.arange(48).view(24, 2)
    gathered_NC = run.gather_positions(x_NC)
    assert torch.equal(gathered_NC, x_NC)
    assert gathered_NC.data_ptr() == x_NC.data_ptr()


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
    query_BHSD, key_BHTD, value_BHTD = (x.transpose(1, 2) for x in (query, key, value))
    expected_BHSD = F.scaled_dot_product_attention(query_BHSD, key_BHTD, value_BHTD)
    expected = expected_BHSD.transpose(1, 2).flatten(2)
    assert torch.equal(out_BSC, expected)
    for i, branch in enumerate(run.branches):
        shown = watcher.seen[AttentionSite(2, 5, branch)]
        assert torch.equal(shown[0], query[i : i + 1])
        assert torch.equal(shown[1], key[i : i + 1])
