"""RenderConfig: reading, overriding, resolving against a model, hashing."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from bachvid.catalog.facts import ModelFacts
from bachvid.catalog.registry import PUBLISHED
from bachvid.errors import ConfigError
from bachvid.methods.base import MethodConfig
from bachvid.planning.config import RenderConfig
from bachvid.planning.resolve import config_hash, read_steps, recorded_steps, resolve_config

CONFIGS = Path(__file__).parents[2] / "configs"
FACTS = PUBLISHED["THUDM/CogVideoX-5b"]


def resolved(*overrides: str, facts: ModelFacts = FACTS) -> RenderConfig:
    return resolve_config(RenderConfig.from_yaml(None, overrides), facts)


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
    config = RenderConfig.from_yaml(None, ["method.vital_layers=[0, 3]"])
    assert config.method.vital_layers == (0, 3)


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
    config = resolved("method.mask_step=7", "method.branches=cond", "video.height=320")
    assert (config.method.mask_step, config.method.branches) == (7, "cond")
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
    method = resolved("method.profile=paper").method
    assert (method.mask_step, method.inject_steps) == (5, (0, 26))
    assert (method.branches, method.pre_pass_injection) == ("both", "background")
    assert (method.match_threshold, method.mask_softmax) == (0.5, "joint")
    assert method.match_within == "video"


def test_the_fast_profile_on_50_steps() -> None:
    method = resolved("method.profile=fast").method
    assert (method.mask_step, method.inject_steps) == (5, (0, 50))
    assert (method.branches, method.pre_pass_injection) == ("cond", "none")


@pytest.mark.parametrize("num_steps", [1, 2, 3, 1000])
@pytest.mark.parametrize("profile", ["paper", "fast"])
def test_a_profile_fits_every_number_of_steps(num_steps: int, profile: str) -> None:
    method = resolved(f"sampling.num_steps={num_steps}", f"method.profile={profile}").method
    assert method.mask_step is not None
    assert method.inject_steps is not None
    assert 0 <= method.mask_step < num_steps
    assert 0 <= method.inject_steps[0] < method.inject_steps[1] <= num_steps


def test_every_run_of_a_frame_video_reads_its_own_steps() -> None:
    method = MethodConfig(
        inject_steps=(1, 6), mask_step=2, pre_passes=1, pre_pass_injection="background"
    )
    assert read_steps(method) == ((1, 2), (1, 2, 3, 4, 5))
    plain = method.model_copy(update={"pre_pass_injection": "none"})
    assert read_steps(plain) == ((), (1, 2, 3, 4, 5))
    repeated = plain.model_copy(update={"pre_passes": 3})
    assert read_steps(repeated) == ((), (1, 2), (1, 2), (1, 2, 3, 4, 5))
    assert read_steps(method.model_copy(update={"name": "none"})) == ((),)


def test_recorded_steps_are_those_that_some_run_reads() -> None:
    method = MethodConfig(
        inject_steps=(4, 6), mask_step=2, pre_passes=1, pre_pass_injection="background"
    )
    assert recorded_steps(method) == (1, 2, 4, 5)
    assert recorded_steps(method.model_copy(update={"pre_pass_injection": "none"})) == (4, 5)
    assert recorded_steps(method.model_copy(update={"name": "none"})) == ()


@pytest.mark.parametrize(
    "override",
    ["sampling.num_steps=49", "method.mask_step=6", "video.width=704", "model.dtype=float32"],
)
def test_the_hash_changes_with_what_changes_pixels(override: str) -> None:
    assert config_hash(resolved(override)) != config_hash(resolved())


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
    assert config_hash(resolved(override)) == config_hash(resolved())
