"""RenderConfig: reading, overriding, resolving against a model, hashing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.registry import published_models
from bachvid.errors import ConfigError
from bachvid.methods.bachvid import BachVid, BachVidConfig, ResolvedBachVid
from bachvid.methods.none import NoneConfig
from bachvid.planning.config import RenderConfig, ResolvedConfig
from bachvid.planning.resolve import build_method, resolve_config

CONFIGS = Path(__file__).parents[2] / "configs"
FACTS = published_models()["THUDM/CogVideoX-5b"]


def resolved(*overrides: str, facts: ModelFacts = FACTS) -> ResolvedConfig:
    return resolve_config(RenderConfig.from_yaml(None, overrides), facts)


def resolved_method(*overrides: str) -> ResolvedBachVid:
    method = resolved(*overrides).method
    assert isinstance(method, ResolvedBachVid)
    return method


def sources(*overrides: str) -> list[tuple[int, ...]]:
    return [run.sources for run in build_method(resolved(*overrides)).runs("frame")]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_starts_with_what_it_needs(path: Path) -> None:
    assert RenderConfig.from_yaml(path).method.name == "bachvid"
    first = path.read_text().splitlines()[0]
    assert first.startswith("#")
    for word in ("GPU", "GiB", "minute"):
        assert word in first


def test_an_override_wins_over_the_file() -> None:
    config = RenderConfig.from_yaml(CONFIGS / "cogvideox-5b.yaml", ["sampling.num_steps=12"])
    assert config.sampling.num_steps == 12
    assert config.sampling.guidance_scale == 6.0


def test_an_override_takes_lists() -> None:
    method = RenderConfig.from_yaml(None, ["method.vital_layers=[0, 3]"]).method
    assert isinstance(method, BachVidConfig)
    assert method.vital_layers == (0, 3)


def test_a_method_has_keys_of_its_own() -> None:
    with pytest.raises(ConfigError, match=re.escape("unknown key 'method.vital_layers'")):
        RenderConfig.from_yaml(None, ["method.vital_layers=[0]", "method.name=none"])
    with pytest.raises(
        ConfigError, match=re.escape("must be 'bachvid' or 'none'. Did you mean \"none\"")
    ):
        RenderConfig.from_yaml(None, ["method.name=nome"])


def test_an_override_of_the_name_leaves_the_keys_of_the_other_method_behind() -> None:
    method = RenderConfig.from_yaml(CONFIGS / "storybook.yaml", ["method.name=none"]).method
    assert method == NoneConfig()


def test_a_resolved_config_can_be_read_again() -> None:
    config = resolved("method.mask_step=7")
    again = RenderConfig.from_values(config.model_dump(mode="json"), source="journal")
    assert resolve_config(again, FACTS) == config


def test_a_mistake_in_an_override_names_the_override_and_one_in_the_file_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("output: {crf: 99}\n")
    with pytest.raises(ConfigError) as caught:
        RenderConfig.from_yaml(path, ["sampling.num_steps=no"])
    assert str(caught.value).splitlines() == [
        "--set sampling.num_steps=no: sampling.num_steps: is false: must be a whole number",
        f"{path}: output.crf: is 99: must be <= 51",
    ]


def test_the_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        RenderConfig().method.name = "none"  # type: ignore[misc]


def test_resolving_leaves_no_none_where_the_render_reads() -> None:
    config = resolved()
    sections: tuple[BaseModel, ...] = (config.video, config.sampling, config.method)
    for section in sections:
        assert None not in dict(section).values()
    assert config.output.fps == 8
    assert config.model.dtype == "bfloat16"


def test_resolving_keeps_what_is_given() -> None:
    method = resolved_method("method.mask_step=7", "method.branches=cond")
    assert (method.mask_step, method.branches) == (7, "cond")
    config = resolved("video.height=320")
    assert (config.video.height, config.video.width) == (320, 720)
    config = resolved("cache.window=2", "cluster.workers=3")
    assert (config.cache.window, config.cluster.workers) == (2, 3)


@pytest.mark.parametrize(
    "override",
    [
        "cache.policy=never",
        "cache.window=0",
        "cache.spill_gb=-1",
        "cache.directory=''",
        "cluster.workers=0",
        "cluster.gpus_per_worker=2",
        "cluster.wait_seconds=-1",
    ],
)
def test_a_cache_or_cluster_that_cannot_be_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        RenderConfig.from_yaml(None, [override])


def test_the_paper_profile_on_50_steps() -> None:
    method = resolved_method("method.profile=paper")
    assert (method.mask_step, method.inject_steps) == (5, (0, 26))
    assert (method.branches, method.pre_pass_injection) == ("both", "background")
    assert (method.match_threshold, method.mask_softmax) == (0.5, "joint")
    assert method.match_within == "video"


def test_the_fast_profile_on_50_steps() -> None:
    method = resolved_method("method.profile=fast")
    assert (method.mask_step, method.inject_steps) == (5, (0, 24))
    assert (method.branches, method.pre_pass_injection) == ("cond", "none")
    assert (method.pre_passes, method.match_within) == (2, "foreground")


@pytest.mark.parametrize("num_steps", [1, 2, 3, 1000])
@pytest.mark.parametrize("profile", ["paper", "fast"])
def test_a_profile_fits_every_number_of_steps(num_steps: int, profile: str) -> None:
    method = resolved_method(f"sampling.num_steps={num_steps}", f"method.profile={profile}")
    assert 0 <= method.mask_step < num_steps
    assert 0 <= method.inject_steps[0] < method.inject_steps[1] <= num_steps


BACKGROUND = ("method.mask_step=2", "method.pre_passes=1", "method.pre_pass_injection=background")
PLAIN = (*BACKGROUND[:2], "method.pre_pass_injection=none")


def test_every_run_of_a_frame_video_reads_its_own_steps() -> None:
    injected = "method.inject_steps=[1, 6]"
    assert sources(*BACKGROUND, injected) == [(1, 2), (1, 2, 3, 4, 5)]
    assert sources(*PLAIN, injected) == [(), (1, 2, 3, 4, 5)]
    repeated = (PLAIN[0], "method.pre_passes=3", PLAIN[2], injected)
    assert sources(*repeated) == [(), (1, 2), (1, 2), (1, 2, 3, 4, 5)]
    assert sources("method.name=none") == [()]


def test_recorded_steps_are_those_that_some_run_reads() -> None:
    injected = "method.inject_steps=[4, 6]"
    for overrides, steps in (
        ((*BACKGROUND, injected), (1, 2, 4, 5)),
        ((*PLAIN, injected), (4, 5)),
        (("method.name=none",), ()),
    ):
        method = build_method(resolved(*overrides))
        assert method.records.steps == steps
        assert method.runs("identity")[-1].records == steps


def test_both_branches_are_named_once() -> None:
    for branches, names in (("both", ("uncond", "cond")), ("cond", ("cond",))):
        method = build_method(resolved(f"method.branches={branches}"))
        assert isinstance(method, BachVid)
        assert method.branches == method.records.branches == names


@pytest.mark.parametrize(
    "override",
    ["sampling.num_steps=49", "method.mask_step=6", "video.width=704", "model.dtype=float32"],
)
def test_the_hash_changes_with_what_changes_pixels(override: str) -> None:
    assert resolved(override).sha256 != resolved().sha256


@pytest.mark.parametrize(
    "override",
    [
        "output.crf=30",
        "model.threads=3",
        "model.device=cpu",
        "method.mask_step=5",
        "cache.policy=retain",
        "cache.window=2",
        "cluster.workers=3",
    ],
)
def test_the_hash_stays_with_what_does_not(override: str) -> None:
    assert resolved(override).sha256 == resolved().sha256
