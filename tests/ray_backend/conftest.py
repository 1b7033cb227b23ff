"""A cluster for the tests that harm none of its nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import cluster_of
from ray.cluster_utils import Cluster


@pytest.fixture(scope="session", autouse=True)
def _what_workers_inherit() -> None:
    """One thread each, since more than cores would only wait; and the toys of the tests' folder."""
    os.environ["OMP_NUM_THREADS"] = "1"
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


@pytest.fixture(scope="session")
def three_nodes() -> Iterator[Cluster]:
    """Three nodes of one CPU each."""
    with cluster_of(3) as cluster:
        yield cluster
