"""Gangs on Ray: several ranks share a video, whatever the sizes of the gangs that write and read.

Not bit for bit what one process gives: matrices of other sizes are multiplied. On CPUs the ranks
talk over gloo, on loopback.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from clusters import STORE_BYTES, cluster_of
from numpy.typing import NDArray
from ray.cluster_utils import Cluster
from test_render_on_ray import STORY, render, settings
from whereabouts import Whereabouts

from bachvid.driver.events import Event, Failed, FrameStep, IdentityStep, Lost, WorkerLost
from bachvid.driver.renderer import StoryRenderer
from bachvid.output.journal import read_run

Latents = Mapping[tuple[str, str], NDArray[np.float32]]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """A node for a gang of 2 and one worker, and one for another gang of 2."""
    with cluster_of(1, head_cpus=3) as cluster:
        cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        yield cluster


def latents(out: Path) -> Latents:
    """Return the latents of a run, which must be whole."""
    records = read_run(out).records
    assert len(records) == sum(1 + len(scene.actions) for scene in STORY.scenes)
    return {
        (scene, video): np.load(out / scene / "frames" / f"{video}.npz")["latents"]
        for scene, video in records
    }


def assert_same_videos(got: Latents, expected: Latents) -> None:
    for key, latent in expected.items():
        np.testing.assert_allclose(got[key], latent, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def expected(tiny_cogvideox_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Latents:
    out = tmp_path_factory.mktemp("local") / "run"
    render(tiny_cogvideox_folder, out, "output.frames=true")
    return latents(out)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ("parallel.gpus_per_frame_actor=2", "cache.policy=retain"),
            id="2 read by 2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("cache.policy=window", "method.profile=paper", "method.pre_passes=1"),
            id="2 read by 1",
        ),
    ],
)
def test_a_gang_gives_the_videos_of_one_process(
    overrides: tuple[str, ...],
    two_nodes: Cluster,
    tiny_cogvideox_folder: Path,
    tmp_path: Path,
) -> None:
    common = ("output.frames=true", *overrides)
    here = [key for key in common if not key.startswith("parallel")]
    render(tiny_cogvideox_folder, tmp_path / "here", *here)
    gangs = ("parallel.identity_gpus=2", *common)
    events = render(tiny_cogvideox_folder, tmp_path / "run", *gangs, address=two_nodes.address)
    assert not [event for event in events if isinstance(event, Failed)]
    assert_same_videos(latents(tmp_path / "run"), latents(tmp_path / "here"))
    ranks = {r.provenance.get("ranks") for r in read_run(tmp_path / "run").records.values()}
    assert "2" in ranks


@pytest.mark.slow
def test_a_gang_that_loses_a_rank_is_started_anew(
    two_nodes: Cluster,
    tiny_cogvideox_folder: Path,
    expected: Latents,
    tmp_path: Path,
) -> None:
    config = settings(
        tiny_cogvideox_folder,
        "output.frames=true",
        "parallel.identity_gpus=2",
        "parallel.gpus_per_frame_actor=2",
        "cache.policy=retain",
    )
    where, killed, lost = Whereabouts(), list[Event](), list[Event]()
    with StoryRenderer(config, tmp_path / "run", address=two_nodes.address) as renderer:
        for event in renderer.stream(STORY):
            assert not isinstance(event, Failed), event
            where.note(event)
            if isinstance(event, Lost | WorkerLost):
                lost.append(event)
            match event:
                case IdentityStep(scene=scene) if not killed:
                    pid = where.pid_of(scene, "identity", rank=1)
                case FrameStep(scene=scene, video=video) if len(killed) == 1:
                    pid = where.pid_of(scene, video, rank=1)
                case _:
                    continue
            killed.append(event)
            os.kill(pid, signal.SIGKILL)
    assert len(killed) == 2
    assert [type(event) for event in lost] == [WorkerLost, Lost] * 2
    assert_same_videos(latents(tmp_path / "run"), expected)
