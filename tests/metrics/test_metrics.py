"""Each metric against a plain-loop reference or a value known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from bachvid.metrics.attributes import attribute_agreement
from bachvid.metrics.background import dilate, luminance
from bachvid.metrics.cost import cost
from bachvid.metrics.motion import motion
from bachvid.metrics.prompt_accuracy import prompt_accuracy
from bachvid.metrics.psnr_bg import CAP_DB, psnr_bg
from bachvid.metrics.sharpness import sharpness_bg
from bachvid.metrics.ssim_bg import ssim_bg
from bachvid.metrics.success import success
from bachvid.output.journal import VideoRecord

EMPTY = np.zeros((2, 16, 16), bool)
RECORD = VideoRecord(
    scene="s",
    video="jumps",
    prompt="p",
    seed=0,
    latents_sha256="",
    frames_sha256="",
    files={},
    seconds={"main_run": 1.5, "decode": 0.5},
    cache_bytes=3 * 2**20,
    recoveries=("empty mask",),
)


def noise(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def test_dilation_equals_a_loop_over_neighbours() -> None:
    mask = np.random.default_rng(0).random((2, 9, 7)) < 0.05
    expected = np.zeros_like(mask)
    for frame, row, column in np.argwhere(mask):
        expected[frame, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3] = True
    np.testing.assert_array_equal(dilate(mask, 2), expected)


def test_psnr_ignores_the_foreground_and_its_margin() -> None:
    foreground = EMPTY.copy()
    foreground[:, 6:9, 6:9] = True
    first = noise(0)
    second = first.copy()
    second[:, 4:11, 4:11] = 0  # the mask and two pixels around it
    assert psnr_bg(first, second, foreground) == CAP_DB
    second[:, 3, 3] = 0
    assert psnr_bg(first, second, foreground) < CAP_DB


def test_psnr_of_a_difference_of_ten_is_known() -> None:
    first = np.full((2, 16, 16, 3), 100, np.uint8)
    assert psnr_bg(first, first + 10, EMPTY) == pytest.approx(20 * math.log10(255 / 10))


def test_psnr_without_background_is_not_a_number() -> None:
    assert math.isnan(psnr_bg(noise(0), noise(1), ~EMPTY))


def test_ssim_equals_a_loop_over_windows() -> None:
    first, second = noise(0), noise(1)
    foreground = EMPTY.copy()
    foreground[0, 8, 8] = True
    one, two = luminance(first).astype(float), luminance(second).astype(float)
    values = []
    for frame in range(2):
        for row in range(10):
            for column in range(10):
                place = (frame, slice(row, row + 7), slice(column, column + 7))
                if foreground[place].any():
                    continue
                a, b = one[place].ravel(), two[place].ravel()
                (var_a, covariance), (_, var_b) = np.cov(a, b)
                values.append(
                    (2 * a.mean() * b.mean() + 6.5025)
                    * (2 * covariance + 58.5225)
                    / ((a.mean() ** 2 + b.mean() ** 2 + 6.5025) * (var_a + var_b + 58.5225))
                )
    assert ssim_bg(first, second, foreground) == pytest.approx(np.mean(values), abs=1e-6)
    assert ssim_bg(first, first, foreground) == pytest.approx(1.0)


def test_sharpness_of_stripes_is_known_and_blur_lowers_it() -> None:
    stripes = np.zeros((2, 16, 16, 3), np.uint8)
    stripes[:, :, ::2] = 10
    assert sharpness_bg(stripes, EMPTY) == pytest.approx(100.0)
    blurred = stripes // 2
    assert sharpness_bg(blurred, EMPTY) == pytest.approx(25.0)


def test_sharpness_does_not_see_the_edge_of_the_character() -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    frames[:, 5:11, 5:11] = 255
    assert sharpness_bg(frames, (frames[..., 0] > 0)) == 0.0


def test_motion_counts_where_the_character_goes_and_leaves() -> None:
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    frames[0, 0, 0] = 40
    frames[1, 0, 1] = 20
    frames[1, 9, 9] = 255  # background: does not count
    foreground = EMPTY.copy()
    foreground[0, 0, 0] = foreground[1, 0, 1] = True
    assert motion(frames, foreground) == pytest.approx(30.0)
    assert math.isnan(motion(frames, EMPTY))


def test_attributes_agree_where_the_words_are_equal() -> None:
    words = {"hat": ["top", "top", "none"], "sky": ["sun", "moon", "sun"]}
    assert attribute_agreement(words, identity=0, video=1) == {"hat": 1.0, "sky": 0.0}
    assert attribute_agreement(words, identity=0, video=2) == {"hat": 0.0, "sky": 1.0}


def test_prompt_accuracy_is_per_part() -> None:
    asked = {"background": "a beach", "action": "jumps"}
    assert prompt_accuracy(asked, {"background": "a beach", "action": "squats"}) == {
        "background": 1.0,
        "action": 0.0,
    }


def test_a_missing_record_is_a_failed_video() -> None:
    assert success(None) == {"rendered": 0.0, "recovered": 0.0}
    assert success(RECORD) == {"rendered": 1.0, "recovered": 1.0}


def test_cost_adds_up_the_stages() -> None:
    assert cost(RECORD) == {"seconds": 2.0, "cache_mebibytes": 3.0}
