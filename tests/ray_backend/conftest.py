"""A cluster for the tests that harm none of its nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from clusters import cluster_of
from ray.cluster_utils import Cluster


@pytest.fixture(scope="session", autouse=True)
def _one_thread_each() -> None:
    """Workers inherit it: more threads than cores would only wait for each other."""
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Cluster]:
    """Three nodes of one CPU each."""
    with cluster_of(3) as cluster:
        yield cluster
