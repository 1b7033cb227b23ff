"""A gang of ranks gives what one process gives: plainly, recording, and injecting.

Real processes over gloo, fp32. Not bit for bit: matrices of other sizes are multiplied.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from gangs import name_of, run_gang
from ranks import Shown, show_all

from bachvid.attention.groups import ALONE
from bachvid.layout.gangs import Gang

PAPER = ("method.profile=paper", "method.mask_step=1", "method.inject_steps=[0, 3]")
FAST = ("method.profile=fast", "method.mask_step=1", "method.pre_passes=2")
# 72, 175 and 80 tokens, so that pads are needed by some gangs, by 2 and 3, and by 3.
MODELS = {
    "rope": ("tiny_cogvideox_folder", (*PAPER, "output.preview_every=3")),
    "no rope": (
        "tiny_cogvideox_2b_folder",
        (*FAST, "video.pixel_frames=9", "video.height=40", "video.width=56"),
    ),
    "wan": (
        "tiny_wan_folder",
        (*PAPER, "video.pixel_frames=9", "video.height=32", "video.width=32"),
    ),
}
# What each gang reads; all of them read what the ones before them wrote, or they themselves.
READS = {
    Gang(): ["1x1"],
    Gang(2): ["1x1", "2x1"],
    Gang(3): ["2x1"],
    Gang(2, cfg=2): ["3x1"],
    Gang(4, cfg=2): ["1x2", "2x2"],
}
TOLERANCE = 1e-5
assert_close = partial(np.testing.assert_allclose, rtol=TOLERANCE, atol=TOLERANCE)


def six_heads(folder: Path, copy: Path) -> Path:
    """Copy a tiny model, with another transformer: 6 heads, for gangs of 2 and 3."""
    shutil.copytree(folder, copy)
    config = CogVideoXTransformer3DModel.load_config(copy, subfolder="transformer")
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel.from_config({**config, "num_attention_heads": 6})
    transformer.save_pretrained(copy / "transformer")
    return copy


Results = Mapping[str, Mapping[str, list[Shown]]]  # by model and gang; one of each rank


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the ranks of all gangs show."""
    root = tmp_path_factory.mktemp("gangs")
    jobs = []
    for model, (fixture, overrides) in MODELS.items():
        folder: Path = request.getfixturevalue(fixture)
        if fixture != "tiny_wan_folder":
            folder = six_heads(folder, root / model)
        (root / f"{model} written").mkdir()
        common = ("model.device=cpu", "sampling.num_steps=4", "sampling.guidance_scale=3")
        overrides = (f"model.id={folder}", *common, *overrides)
        jobs.append((overrides, root / f"{model} written"))
    by_gang = {}
    for gang, reads in READS.items():
        whole = [(*job, reads) for job in jobs]
        by_gang[name_of(gang)] = (
            [show_all(ALONE, gang, whole)]
            if gang.size == 1
            else run_gang(gang, root, partial(show_all, gang=gang, jobs=whole))
        )
    # One process reads last of all, from other gangs.
    by_gang["last"] = [show_all(ALONE, Gang(), [(*job, ["2x1", "2x2"]) for job in jobs])]
    return {
        model: {name: [rank[i] for rank in ranks] for name, ranks in by_gang.items()}
        for i, model in enumerate(MODELS)
    }


@pytest.fixture(params=MODELS)
def shown(request: pytest.FixtureRequest, results: Results) -> Mapping[str, list[Shown]]:
    return results[request.param]


def test_the_story_is_one_that_tests_something(shown: Mapping[str, list[Shown]]) -> None:
    (alone,) = shown["1x1"]
    mask = alone.manifest.foreground_mask_N
    assert mask is not None
    assert 0.1 < mask.float().mean() < 0.9
    video = alone.frames["1x1"]
    assert video is not None
    assert video.matched is not None
    assert video.matched.used.any()
    assert alone.identity is not None
    assert not video.recoveries
    assert np.abs(video.latents - alone.plain).max() > 1000 * TOLERANCE


def test_plain_and_recorded_videos_are_those_of_one_process(
    shown: Mapping[str, list[Shown]],
) -> None:
    (alone,) = shown["1x1"]
    for ranks in shown.values():
        for rank in ranks:
            assert_close(rank.plain, alone.plain)
        assert ranks[0].identity is not None
        np.testing.assert_allclose(
            ranks[0].identity.latents, alone.plain, rtol=TOLERANCE, atol=TOLERANCE
        )
        assert alone.identity is not None
        pixels = ranks[0].identity.frames.astype(np.int16) - alone.identity.frames
        assert np.abs(pixels).max() <= 1  # bytes; ranks of Wan decode together


def test_masks_and_features_are_the_same_on_every_rank(shown: Mapping[str, list[Shown]]) -> None:
    (alone,) = shown["1x1"]
    for ranks in shown.values():
        for rank in ranks:
            expected, found = (each.manifest.foreground_mask_N for each in (alone, rank))
            assert expected is not None
            assert found is not None
            assert found.equal(expected)
            assert rank.manifest.features.keys() == alone.manifest.features.keys()
            for layer, features in alone.manifest.features.items():
                torch.testing.assert_close(
                    rank.manifest.features[layer], features, rtol=TOLERANCE, atol=TOLERANCE
                )


def test_frame_videos_are_those_of_one_process_whoever_recorded(
    shown: Mapping[str, list[Shown]],
) -> None:
    (alone,) = shown["1x1"]
    expected = alone.frames["1x1"]
    assert expected is not None
    assert expected.matched is not None
    assert expected.foreground is not None
    for ranks in shown.values():
        for video in ranks[0].frames.values():
            assert video is not None
            assert video.foreground is not None
            np.testing.assert_allclose(
                video.latents, expected.latents, rtol=TOLERANCE, atol=TOLERANCE
            )
            assert np.array_equal(video.foreground, expected.foreground)
            assert video.matched is not None
            assert np.array_equal(video.matched.used, expected.matched.used)
            assert np.array_equal(video.matched.index_N, expected.matched.index_N)


def test_one_rank_of_a_gang_sees_pixels(shown: Mapping[str, list[Shown]]) -> None:
    (alone,) = shown["1x1"]
    for ranks in shown.values():
        assert ranks[0].num_previews == alone.num_previews
        for rank in ranks[1:]:
            assert rank.identity is None
            assert set(rank.frames.values()) == {None}
            assert rank.num_previews == 0


def test_a_video_tells_how_many_ranks_made_it(results: Results) -> None:
    told = {name: ranks[0].provenance.get("ranks") for name, ranks in results["rope"].items()}
    wanted = {"1x1": None, "2x1": "2", "3x1": "3", "1x2": "1 x cfg 2", "2x2": "2 x cfg 2"}
    assert told == {**wanted, "last": None}
    assert results["rope"]["1x1"][0].num_previews == 1
