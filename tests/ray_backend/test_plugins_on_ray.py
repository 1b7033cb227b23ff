"""The toy method and the toy family on a cluster, whose workers know them by their config alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import test_plugins
from clusters import cluster_of


@pytest.mark.parametrize("policy", ["window", pytest.param("retain", marks=pytest.mark.slow)])
def test_both_toys_are_rendered_on_a_cluster(
    policy: str, tiny_cogvideox_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = Path(test_plugins.__file__).parent
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    )
    folder = test_plugins.toy_folder(tiny_cogvideox_folder, tmp_path / "toy")
    expected = test_plugins.render(test_plugins.settings(folder), tmp_path / "here")
    config = test_plugins.settings(folder, f"cache.policy={policy}")
    with cluster_of(2) as cluster:
        assert test_plugins.render(config, tmp_path / "there", address=cluster.address) == expected
