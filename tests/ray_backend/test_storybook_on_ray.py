"""The example story with the embedded models: through Ray as in one process.

Bit for bit, where one rank renders a video; a gang of two, whose matrices have other sizes, nearly.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clusters import cluster_of
from ray.cluster_utils import Cluster
from test_render_on_ray import hashes

from bachvid.driver.renderer import Failed, StoryRenderer
from bachvid.inputs.story import Story
from bachvid.planning.config import RenderConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "lighthouse.yaml"
Hashes = dict[tuple[str, str], tuple[str, str]]


def render(out: Path, *overrides: str, address: str | None = None) -> Hashes:
    config = RenderConfig.from_yaml(None, ["model.threads=1", *overrides])
    with StoryRenderer(config, out, address=address) as renderer:
        events = list(renderer.stream(Story.load(EXAMPLE)))
    assert not [event for event in events if isinstance(event, Failed)]
    return hashes(out)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Hashes:
    return render(tmp_path_factory.mktemp("here") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["window", "retain"])
def test_one_identity_worker_and_two_others_give_the_same_latents(
    policy: str, three_nodes: Cluster, expected: Hashes, tmp_path: Path
) -> None:
    overrides = [f"cache.policy={policy}", "cache.window=2"]
    assert render(tmp_path / "run", *overrides, address=three_nodes.address) == expected


@pytest.mark.slow
@pytest.mark.parametrize("model", ["storybook", "storybook-wan"])
def test_a_gang_of_two_and_two_frame_actors_give_the_same_videos(
    model: str, tmp_path: Path
) -> None:
    common = [f"model.id={model}", "output.frames=true"]
    keys = render(tmp_path / "here", *common).keys()
    with cluster_of(1, head_cpus=4) as cluster:
        gang = ["parallel.identity_gpus=2", "cluster.workers=3"]
        render(tmp_path / "run", *common, *gang, address=cluster.address)
    for scene, video in keys:
        path = Path(scene) / "frames" / f"{video}.npz"
        here, there = np.load(tmp_path / "here" / path), np.load(tmp_path / "run" / path)
        np.testing.assert_allclose(there["latents"], here["latents"], rtol=0, atol=1e-4)
        assert np.array_equal(there["foreground"], here["foreground"])
