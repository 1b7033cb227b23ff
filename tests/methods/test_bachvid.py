"""BachVid's controls on a small joint-attention transformer, against loops and float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

from bachvid.attention.attend import attend, controlled_attention
from bachvid.attention.context import RunContext
from bachvid.attention.control import QKV, AttentionControl, KVGroup
from bachvid.attention.rotary import Rotary
from bachvid.errors import CacheMissError, LayoutError, WorkerError
from bachvid.kv.cache import IdentityManifest, MemoryPieces, SceneCache, Shard
from bachvid.layout.gangs import Branch
from bachvid.layout.records import AttentionSite, Records, RecordSet
from bachvid.layout.tokens import TokenLayout
from bachvid.methods.bachvid import BachVid, ResolvedBachVid
from bachvid.methods.base import Observation, RunControl, RunInputs
from bachvid.methods.controls.injecting import FrameInjector, PrePassInjector
from bachvid.methods.controls.observing import VideoObserver
from bachvid.methods.none import ResolvedNone, Vanilla
from bachvid.methods.ops.masks import ForegroundMask, MaskRecovery
from bachvid.prompts.tokenizer import TokenizedPrompt

LAYOUT = TokenLayout(text_tokens=8, latent_frames=2, grid_height=3, grid_width=4)
HEADS, WIDTH, LAYERS, STEPS = 2, 16, 4, 6
CHANNELS = HEADS * WIDTH
PROMPT = TokenizedPrompt(
    ids=(5, 6, 3, 7, 8, 9, 1, 0),
    rows={"background": (0, 1), "character": (3, 4), "action": (5,)},
    num_tokens=7,
)
CONFIG = ResolvedBachVid(
    vital_layers=(1, 3),
    mask_layers=(0, 2),
    match_layers=(1, 2),
    mask_step=2,
    mask_words="all",
    inject_steps=(0, 4),
    branches="both",
    pre_passes=1,
    pre_pass_injection="background",
    match_threshold=0.1,
    match_within="video",
)
PLAIN = CONFIG.model_copy(update={"pre_pass_injection": "none"})
BRANCHES: tuple[Branch, ...] = ("uncond", "cond")


def table() -> Rotary:
    height, width = LAYOUT.grid_height, LAYOUT.grid_width
    return Rotary(
        *get_3d_rotary_pos_embed(
            WIDTH, ((0, 0), (height, width)), (height, width), LAYOUT.latent_frames, use_real=True
        )
    )


class TinyTransformer:
    """Joint attention over [text | video], four layers, both branches in one batch."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (LAYERS, 4, CHANNELS, CHANNELS)
        self.weights = torch.randn(shape, generator=generator) / CHANNELS**0.5

    def qkv(self, layer: int, x_BSC: Tensor) -> QKV:
        parts = [(x_BSC @ w).unflatten(-1, (HEADS, WIDTH)) for w in self.weights[layer, :3]]
        query, key = (torch.nn.functional.normalize(p, dim=-1) * 3 for p in parts[:2])
        return QKV(query, key, parts[2])

    def render(
        self,
        run: RunContext,
        control: AttentionControl,
        *,
        seed: int,
        stop_after: int = STEPS - 1,
    ) -> Tensor:
        """Denoise, after a fashion; the seed gives noise and text. Returns latents [N, C]."""
        generator = torch.Generator().manual_seed(seed)
        text_BTC = torch.randn(2, LAYOUT.text_tokens, CHANNELS, generator=generator)
        latents_NC = torch.randn(LAYOUT.video_tokens, CHANNELS, generator=generator)
        for step in range(stop_after + 1):
            run.step = step
            x_BSC = torch.cat([text_BTC, latents_NC.expand(2, -1, -1)], dim=1)
            for layer in range(LAYERS):
                out_BSC = controlled_attention(run, control, layer, self.qkv(layer, x_BSC))
                x_BSC = x_BSC + out_BSC @ self.weights[layer, 3]
            uncond, cond = x_BSC[:, LAYOUT.video_rows]
            latents_NC = 0.9 * latents_NC + 0.1 * (uncond + 3 * (cond - uncond))
        return latents_NC


def new_run(rotary: Rotary | None = None) -> RunContext:
    return RunContext(LAYOUT, rotary or table(), branches=BRANCHES)


def but(config: ResolvedBachVid, **changes: object) -> ResolvedBachVid:
    return config.model_copy(update=changes)


def method(config: ResolvedBachVid = CONFIG) -> BachVid:
    return BachVid(config, num_steps=STEPS)


def recorder(
    context: RunContext, sink: MemoryPieces, config: ResolvedBachVid = CONFIG
) -> RunControl:
    (run,) = method(config).runs("identity")
    return method(config).control(
        "identity", 0, RunInputs(run, context, PROMPT, MemoryPieces(), sink)
    )


def control_of(
    number: int,
    context: RunContext,
    scene: SceneCache | None = None,
    *earlier: Observation,
    config: ResolvedBachVid = CONFIG,
    prompt: TokenizedPrompt = PROMPT,
) -> RunControl:
    """Return the control of a run of a frame video; -1 is the main run."""
    runs = method(config).runs("frame")
    given = RunInputs(runs[number], context, prompt, MemoryPieces(), None, scene, earlier)
    return method(config).control("frame", range(len(runs))[number], given)


def seen_by(control: RunControl) -> Observation:
    assert control.observation is not None
    return control.observation


def mask_of(observation: Observation) -> ForegroundMask:
    assert observation.foreground is not None
    return observation.foreground


def identity_mask(scene: SceneCache) -> Tensor:
    assert scene.manifest.foreground_mask_N is not None
    return scene.manifest.foreground_mask_N


def render_identity(config: ResolvedBachVid = CONFIG) -> SceneCache:
    context, pieces = new_run(), MemoryPieces()
    control = recorder(context, pieces, config)
    TinyTransformer().render(context, control, seed=1)
    seen, records = seen_by(control), method(config).records
    manifest = IdentityManifest(LAYOUT, records, mask_of(seen).mask_N, seen.features, 1, "c" * 64)
    return SceneCache(manifest, pieces)


def observe(config: ResolvedBachVid, scene: SceneCache | None, seed: int = 2) -> Observation:
    context = new_run()
    control = control_of(0, context, scene, config=config)
    TinyTransformer().render(context, control, seed=seed, stop_after=config.mask_step)
    return seen_by(control)


class SiteLog(AttentionControl):
    """Keeps the queries, keys, values and outputs that pass every site."""

    def __init__(self) -> None:
        self.qkv: dict[AttentionSite, QKV] = {}
        self.out: dict[AttentionSite, Tensor] = {}

    def before(self, site: AttentionSite, qkv: QKV) -> QKV:
        self.qkv[site] = QKV(*(x.clone() for x in qkv))
        return qkv

    def after(self, site: AttentionSite, out_BSC: Tensor) -> Tensor:
        self.out[site] = out_BSC.clone()
        return out_BSC


def plain_log(seed: int) -> SiteLog:
    log, run = SiteLog(), new_run()
    TinyTransformer().render(run, log, seed=seed)
    return log


def reference_score(log: SiteLog, step: int, softmax: str, layers: tuple[int, ...]) -> Tensor:
    """Eq. (1)-(4) by loops in float64: character less background mass of every video token."""
    score_N = torch.zeros(LAYOUT.video_tokens, dtype=torch.float64)
    num_keys = LAYOUT.joint_tokens if softmax == "joint" else PROMPT.num_tokens - 1
    for layer in layers:
        qkv = log.qkv[AttentionSite(step, layer, "cond")]
        query, key = (table().rotate_joint(x, LAYOUT)[0].double() for x in qkv[:2])
        for i in range(LAYOUT.video_tokens):
            for h in range(HEADS):
                row = LAYOUT.text_tokens + i
                weights = [
                    math.exp(float(query[row, h] @ key[k, h]) / WIDTH**0.5) for k in range(num_keys)
                ]
                share = sum(weights[k] for k in PROMPT.rows["character"]) / 2
                share -= sum(weights[k] for k in PROMPT.rows["background"]) / 2
                score_N[i] += share / sum(weights) / HEADS
    return score_N


def reference_out(qkv: QKV, shard: Shard, injector: FrameInjector) -> Tensor:
    """Eq. (12)-(14) by loops in float64: the attention output of every row, one branch."""
    tokens, rotary = injector.injected, table()
    query, key = (rotary.rotate_joint(x, LAYOUT)[0].double() for x in qkv[:2])
    sources = {
        "character": (tokens.foreground_positions_Q, tokens.identity_index_Q),
        "background": (tokens.background_positions_Q, tokens.background_positions_Q),
    }
    out = torch.zeros_like(query)
    for row in range(LAYOUT.joint_tokens):
        keys = [key[k] for k in range(LAYOUT.joint_tokens)]
        values = [qkv.value_BSHD[0, k].double() for k in range(LAYOUT.joint_tokens)]
        for positions, indices in sources.values():
            if row - LAYOUT.text_tokens not in positions.tolist():
                continue
            for position, index in zip(positions.tolist(), indices.tolist(), strict=True):
                one_key = shard.pieces["key"][:, index : index + 1]
                keys.append(rotary.rotate(one_key, torch.tensor([position]))[0, 0].double())
                values.append(shard.pieces["value"][0, index].double())
        for h in range(HEADS):
            logits = torch.stack([query[row, h] @ k[h] for k in keys]) / WIDTH**0.5
            out[row, h] = logits.softmax(0) @ torch.stack([v[h] for v in values])
    return out.flatten(1)


def test_recording_leaves_the_video_unchanged() -> None:
    run = new_run()
    expected = TinyTransformer().render(run, AttentionControl(), seed=1)
    control = recorder(run, MemoryPieces())
    actual = TinyTransformer().render(run, control, seed=1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("branches", [("uncond", "cond"), ("cond",)])
def test_the_recorder_keeps_vital_layers_recorded_steps_and_its_branches(
    branches: tuple[Branch, ...],
) -> None:
    cache, log = (
        render_identity(but(CONFIG, branches="both" if len(branches) == 2 else "cond")),
        plain_log(seed=1),
    )
    kept = 0
    for site, qkv in log.qkv.items():
        if site.step < 4 and site.layer in (1, 3) and site.branch in branches:
            shard = cache.source.get(site)
            assert torch.equal(shard.pieces["key"], qkv.key_BSHD[:, LAYOUT.video_rows])
            assert torch.equal(shard.pieces["value"], qkv.value_BSHD[:, LAYOUT.video_rows])
            kept += shard.nbytes
        else:
            with pytest.raises(CacheMissError):
                cache.source.get(site)
    assert isinstance(cache.source, MemoryPieces)
    assert cache.source.nbytes == kept > 0
    kinds = RecordSet(("key", "value"), (1, 3), (0, 1, 2, 3), branches)
    assert cache.manifest.records == Records((kinds,))
    assert kept == cache.manifest.records.num_pieces * LAYOUT.video_tokens * CHANNELS * 4


def test_the_recorder_copies_and_hands_on_what_it_was_given() -> None:
    run, store = new_run(), MemoryPieces()
    control = recorder(run, store)
    site = AttentionSite(0, 1, "cond")
    qkv = plain_log(seed=1).qkv[site]
    before = QKV(*(x.clone() for x in qkv))
    assert control.before(site, qkv) is qkv
    assert all(torch.equal(x, y) for x, y in zip(qkv, before, strict=True))
    qkv.key_BSHD.zero_()
    expected = before.key_BSHD[:, LAYOUT.video_rows]
    assert torch.equal(store.get(site).pieces["key"], expected)


@pytest.mark.parametrize("softmax", ["joint", "text"])
def test_the_mask_equals_its_definition(softmax: str) -> None:
    settings = but(PLAIN, mask_softmax=softmax)
    observation, log = observe(settings, None), plain_log(seed=2)
    expected_N = reference_score(log, 2, softmax, CONFIG.mask_layers)
    torch.testing.assert_close(
        mask_of(observation).score_N.double(), expected_N, rtol=1e-4, atol=1e-7
    )
    assert torch.equal(mask_of(observation).mask_N, expected_N >= 0)
    assert 0 < int(mask_of(observation).mask_N.sum()) < LAYOUT.video_tokens
    assert observation.recoveries == ()


def test_features_are_the_conditional_outputs_at_the_mask_step() -> None:
    observation = observe(PLAIN, None)
    log = plain_log(seed=2)
    assert list(observation.features) == [1, 2]
    for layer, feature_NC in observation.features.items():
        out_BSC = log.out[AttentionSite(2, layer, "cond")]
        assert torch.equal(feature_NC, out_BSC[0, LAYOUT.video_rows])


def test_identity_and_pre_pass_observe_alike() -> None:
    settings = PLAIN
    cache, observation = render_identity(settings), observe(settings, None, seed=1)
    assert torch.equal(identity_mask(cache), mask_of(observation).mask_N)
    for layer, feature_NC in observation.features.items():
        assert torch.equal(cache.manifest.features[layer], feature_NC)


def test_a_run_that_ended_too_early_has_no_observation() -> None:
    run = new_run()
    control = recorder(run, MemoryPieces())
    TinyTransformer().render(run, control, seed=1, stop_after=1)
    assert control.observation is None


def frame_injector(config: ResolvedBachVid, cache: SceneCache) -> FrameInjector:
    injector = control_of(-1, new_run(), cache, observe(config, cache), config=config)
    assert isinstance(injector, FrameInjector)
    assert len(injector.injected.foreground_rows_Q) > 0
    assert len(injector.injected.background_rows_Q) > 0
    return injector


def test_injection_equals_its_definition_in_each_branch() -> None:
    cache, log = render_identity(), plain_log(seed=2)
    injector = frame_injector(CONFIG, cache)
    sites = [AttentionSite(3, 1, branch) for branch in BRANCHES]
    batch = QKV(*(torch.cat(x) for x in zip(*(log.qkv[s] for s in sites), strict=True)))
    run = new_run()
    run.step = 3
    out_BSC = controlled_attention(run, injector, 1, batch)
    for i, site in enumerate(sites):
        expected_SC = reference_out(log.qkv[site], cache.source.get(site), injector)
        torch.testing.assert_close(out_BSC[i].double(), expected_SC, rtol=1e-5, atol=1e-6)


def test_text_and_unmatched_rows_see_no_identity_keys() -> None:
    cache, log = render_identity(), plain_log(seed=2)
    injector, site = frame_injector(CONFIG, cache), AttentionSite(0, 1, "cond")
    run = new_run()
    groups = injector.extra(site, log.qkv[site])
    out = attend(log.qkv[site], groups, run.rotary, LAYOUT)[0].flatten(1)
    changed_S = (out - log.out[site][0]).abs().amax(dim=-1) > 1e-5
    tokens = injector.injected
    seeing = torch.cat([tokens.foreground_rows_Q, tokens.background_rows_Q]).sort().values
    assert torch.equal(changed_S.nonzero().flatten(), seeing)
    assert int(seeing.min()) >= LAYOUT.text_tokens
    assert len(seeing) < LAYOUT.video_tokens


def test_matched_within_the_foreground_every_foreground_token_finds_one() -> None:
    settings = but(CONFIG, match_within="foreground", match_threshold=-1.0)
    cache = render_identity(settings)
    injector = frame_injector(settings, cache)
    mask_N = mask_of(injector.observation).mask_N
    tokens = injector.injected
    assert torch.equal(tokens.foreground_positions_Q, mask_N.nonzero().flatten())
    assert bool(identity_mask(cache)[tokens.identity_index_Q].all())
    whole = frame_injector(but(settings, match_within="video"), cache).injected
    assert len(whole.foreground_rows_Q) < len(tokens.foreground_rows_Q)


def injected_sites(control: AttentionControl) -> set[AttentionSite]:
    qkv = plain_log(seed=2).qkv
    return {site for site, part in qkv.items() if control.extra(site, part)}


@pytest.mark.parametrize("branches", [("uncond", "cond"), ("cond",)])
def test_injection_is_in_vital_layers_configured_steps_and_branches(
    branches: tuple[Branch, ...],
) -> None:
    settings = but(CONFIG, branches="both" if len(branches) == 2 else "cond", inject_steps=(1, 3))
    injector = frame_injector(settings, render_identity(settings))
    assert injected_sites(injector) == {
        AttentionSite(step, layer, branch)
        for step in (1, 2)
        for layer in (1, 3)
        for branch in branches
    }


def test_injection_changes_the_video_and_the_branches_chosen_matter() -> None:
    videos = []
    for branches in ("both", "cond"):
        settings = but(PLAIN, branches=branches)
        run, cache = new_run(), render_identity(settings)
        injector = frame_injector(settings, cache)
        videos.append(TinyTransformer().render(run, injector, seed=2))
    vanilla = TinyTransformer().render(new_run(), AttentionControl(), seed=2)
    assert not torch.allclose(videos[0], vanilla, atol=1e-3)
    assert not torch.allclose(videos[0], videos[1], atol=1e-3)


def test_each_branch_reads_its_own_shards() -> None:
    cache = render_identity()
    injector, log = frame_injector(CONFIG, cache), plain_log(seed=2)
    uncond, cond = (AttentionSite(0, 1, branch) for branch in BRANCHES)
    before = [injector.extra(site, log.qkv[site]) for site in (uncond, cond)]
    kept = cache.source.get(uncond)
    assert isinstance(cache.source, MemoryPieces)
    changed = Shard(uncond, {"key": kept.pieces["key"] + 1, "value": kept.pieces["value"]})
    cache.source.put(changed)
    after = [injector.extra(site, log.qkv[site]) for site in (uncond, cond)]
    assert torch.equal(after[0][0].key_BMHD, before[0][0].key_BMHD + 1)
    assert torch.equal(after[1][0].key_BMHD, before[1][0].key_BMHD)


def test_a_video_injected_into_itself_counts_its_background_twice() -> None:
    """Every token background, the same keys again: as if their logits were log 2 higher."""
    cache, log = render_identity(), plain_log(seed=1)
    nowhere = torch.zeros(LAYOUT.video_tokens, dtype=torch.bool)
    cache = replace(cache, manifest=replace(cache.manifest, foreground_mask_N=nowhere))
    nothing = ForegroundMask(nowhere, nowhere.float(), None)
    run = new_run()
    injector = control_of(-1, run, cache, Observation(nothing, cache.manifest.features))
    site = AttentionSite(1, 3, "cond")
    qkv = log.qkv[site]
    actual = attend(qkv, injector.extra(site, qkv), run.rotary, LAYOUT)
    bias = torch.zeros(LAYOUT.joint_tokens, LAYOUT.joint_tokens)
    bias[LAYOUT.video_rows, LAYOUT.video_rows] = math.log(2)
    query, key = (run.rotary.rotate_joint(x, LAYOUT).transpose(1, 2) for x in qkv[:2])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, qkv.value_BSHD.transpose(1, 2), attn_mask=bias
    ).transpose(1, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_pre_pass_injects_background_from_step_1_by_the_previous_mask() -> None:
    cache, run = render_identity(), new_run()
    control = control_of(0, run, cache)
    assert isinstance(control, PrePassInjector)
    TinyTransformer().render(run, control, seed=2, stop_after=2)
    assert sorted(control.masks) == [0, 1, 2]
    assert injected_sites(control) == {
        AttentionSite(step, layer, branch)
        for step in (1, 2)
        for layer in (1, 3)
        for branch in BRANCHES
    }
    site = AttentionSite(2, 1, "cond")
    (group,) = control.extra(site, plain_log(seed=2).qkv[site])
    expected_N = ~(control.masks[1].mask_N | identity_mask(cache))
    assert torch.equal(group.positions_M, expected_N.nonzero().flatten())
    assert torch.equal(group.query_rows_Q, group.positions_M + LAYOUT.text_tokens)
    assert not torch.equal(control.masks[1].mask_N, control.masks[0].mask_N)


def test_a_pre_pass_with_injection_sees_the_injected_video() -> None:
    settings, cache = but(CONFIG, inject_steps=(3, 4)), render_identity()
    injected, vanilla = observe(settings, cache), plain_log(seed=2)
    feature_NC = injected.features[1]
    plain_NC = vanilla.out[AttentionSite(2, 1, "cond")][0, LAYOUT.video_rows]
    assert not torch.allclose(feature_NC, plain_NC, atol=1e-3)


def test_a_pre_pass_without_injection_needs_no_cache_and_one_mask() -> None:
    run = new_run()
    control = control_of(0, run, config=PLAIN)
    TinyTransformer().render(run, control, seed=2, stop_after=2)
    assert isinstance(control, VideoObserver)
    assert sorted(control.masks) == [2]
    assert injected_sites(control) == set()


def test_a_repeated_pre_pass_sees_the_video_of_the_main_run() -> None:
    settings = but(PLAIN, pre_passes=2)
    cache = render_identity(settings)
    first = observe(settings, None)
    run, main_run = new_run(), new_run()
    control = control_of(1, run, cache, first, config=settings)
    TinyTransformer().render(run, control, seed=2, stop_after=2)
    injector = control_of(-1, main_run, cache, first, config=settings)
    assert injected_sites(control) == {s for s in injected_sites(injector) if s.step <= 2}

    class Logged(SiteLog):
        def extra(self, site: AttentionSite, qkv: QKV) -> Sequence[KVGroup]:
            return injector.extra(site, qkv)

    log = Logged()
    TinyTransformer().render(main_run, log, seed=2)
    for layer, feature_NC in seen_by(control).features.items():
        seen = log.out[AttentionSite(2, layer, "cond")][0, LAYOUT.video_rows]
        assert torch.equal(feature_NC, seen)
        assert not torch.equal(feature_NC, first.features[layer])


def test_a_repeated_pre_pass_keeps_the_recoveries_of_the_one_before() -> None:
    settings = but(PLAIN, pre_passes=2)
    cache = render_identity(settings)
    first = observe(settings, None)
    found = MaskRecovery(step=2, found="empty", remedy="background_only", threshold=None)
    run = new_run()
    control = control_of(1, run, cache, replace(first, recoveries=(found,)), config=settings)
    TinyTransformer().render(run, control, seed=2, stop_after=2)
    assert seen_by(control).recoveries == (found,)


def test_a_main_run_restarts_as_if_there_had_been_no_pre_pass() -> None:
    run = new_run()
    control = control_of(0, run, config=PLAIN)
    TinyTransformer().render(run, control, seed=2, stop_after=2)
    restarted = TinyTransformer().render(run, AttentionControl(), seed=2)
    plain = TinyTransformer().render(new_run(), AttentionControl(), seed=2)
    assert torch.equal(restarted, plain)


def test_empty_masks_are_recovered_and_reported() -> None:
    swapped = replace(
        PROMPT, rows={"background": (0, 1), "character": (0, 1), "action": (5,)}
    )  # equal masses: ties are foreground, so every mask is full
    run = new_run()
    control = control_of(0, run, render_identity(), prompt=swapped)
    TinyTransformer().render(run, control, seed=2, stop_after=2)
    recoveries = seen_by(control).recoveries
    assert [(r.step, r.found, r.remedy) for r in recoveries] == [
        (step, "full", "background_only") for step in range(3)
    ]
    strict = but(CONFIG, on_empty_mask="fail")
    control = control_of(0, run, render_identity(), config=strict, prompt=swapped)
    with pytest.raises(WorkerError, match="mask at step 2 is full"):
        TinyTransformer().render(run, control, seed=2, stop_after=2)


def test_two_videos_in_one_batch_are_refused() -> None:
    run = RunContext(LAYOUT, table(), step=2, branches=("cond",))
    control = recorder(run, MemoryPieces())
    qkv = QKV(*torch.randn(3, 2, LAYOUT.joint_tokens, HEADS, WIDTH))
    with pytest.raises(LayoutError, match="2 videos in one batch"):
        controlled_attention(run, control, 0, qkv)


def test_a_model_without_rope_is_injected() -> None:
    cache = render_identity()
    run = new_run(Rotary.none())
    injector = control_of(-1, run, cache, observe(CONFIG, cache))
    assert len(injected_sites(injector)) == 4 * 2 * 2


def test_vanilla_observes_masks_and_changes_nothing() -> None:
    config = ResolvedNone(mask_layers=(0, 2), mask_step=2, mask_words="all")
    vanilla = Vanilla(config, num_steps=STEPS)
    plain = TinyTransformer().render(new_run(), AttentionControl(), seed=2)
    assert (vanilla.records.num_pieces, vanilla.matching) == (0, None)
    observed = observe(PLAIN, None)
    for role in ("identity", "frame"):
        (run,) = vanilla.runs(role)  # without a pre-pass
        assert (run.reads, run.records) == ((), ())
        context, sink = new_run(), MemoryPieces()
        given = RunInputs(run, context, PROMPT, MemoryPieces(), sink)
        control = vanilla.control(role, 0, given)
        assert isinstance(control, VideoObserver)
        assert torch.equal(TinyTransformer().render(context, control, seed=2), plain)
        assert torch.equal(mask_of(seen_by(control)).mask_N, mask_of(observed).mask_N)
        assert (seen_by(control).features, control.injected, sink.nbytes) == ({}, None, 0)
