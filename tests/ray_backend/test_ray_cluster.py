"""Reaching a cluster, seeing what it has, and saying soon that there is none."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from bad_inputs import GOOD_STORY
from click.testing import CliRunner
from clusters import STORE_BYTES
from json_models import write_json_model
from ray.cluster_utils import Cluster

from bachvid.cli.main import main
from bachvid.errors import ConfigError
from bachvid.ray_backend.connection import read_cluster


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that is nobody's."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_the_nodes_of_a_cluster_are_read_and_left_alone(three_nodes: Cluster) -> None:
    nodes = read_cluster(three_nodes.address).nodes
    assert [(node.cpus, node.gpus, node.store_bytes) for node in nodes] == [(1, 0, STORE_BYTES)] * 3
    assert len({node.id for node in nodes}) == 3
    assert not ray.is_initialized()


def test_plan_prints_what_a_cluster_does(three_nodes: Cluster, tmp_path: Path) -> None:
    folder = write_json_model(tmp_path / "model", with_vocabulary=True)
    story = tmp_path / "story.yaml"
    story.write_text(GOOD_STORY)
    arguments = ["plan", str(story), "--set", f"model.id={folder}"]
    result = CliRunner().invoke(main, [*arguments, "--address", three_nodes.address])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "workers   3 on cpu, 1 CPU each: 1 wave" in result.stdout
    too_many = [*arguments, "--address", three_nodes.address, "--set", "cluster.workers=4"]
    result = CliRunner().invoke(main, too_many)
    assert result.exit_code == 2
    assert "cluster.workers: asks for 4 workers" in result.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "nowhere.invalid:6379"])
def test_a_cluster_that_is_not_there_is_noticed_soon(address: str, deaf_port: int) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        read_cluster(address.format(port=deaf_port))
    assert time.monotonic() - start < 10


def test_a_stale_address_of_the_environment_is_noticed_soon(
    deaf_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{deaf_port}")
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        read_cluster("auto")


@pytest.mark.parametrize("address", ["", "head", "ray://head:10001", "head:", ":6379"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match='must be "auto", "local" or host:port'):
        read_cluster(address)
