"""The toy method and the toy family on a cluster, whose workers know them by their config alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_plugins
from ray.cluster_utils import Cluster
from test_plugins import toys

__all__ = ["toys"]  # a fixture of every test here


@pytest.mark.parametrize("policy", ["window", pytest.param("retain", marks=pytest.mark.slow)])
def test_both_toys_are_rendered_on_a_cluster(
    policy: str, three_nodes: Cluster, tiny_cogvideox_folder: Path, tmp_path: Path
) -> None:
    folder = test_plugins.toy_folder(tiny_cogvideox_folder, tmp_path / "toy")
    expected = test_plugins.render(test_plugins.settings(folder), tmp_path / "here")
    there = test_plugins.settings(folder, f"cache.policy={policy}", "cluster.workers=2")
    found = test_plugins.render(there, tmp_path / "there", address=three_nodes.address)
    assert found == expected
