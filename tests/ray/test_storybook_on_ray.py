"""The example story with the embedded model: through Ray as in one process, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from test_render_on_ray import hashes

from bachvid.config import RenderConfig
from bachvid.driver import Failed, StoryRenderer
from bachvid.story import Story

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
