"""A cluster for the tests that harm none of its nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from clusters import start_cluster
from ray.cluster_utils import Cluster


@pytest.fixture(scope="session", autouse=True)
def _workers_find_the_tests() -> None:
    """Workers of the tests run one torch thread each, whatever the machine has."""
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes of one CPU each, for the tests of a module that harm none of them."""
    cluster = start_cluster(Path("/tmp") / f"bachvid-ray-{os.getpid()}", nodes=3, cpus=1)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
