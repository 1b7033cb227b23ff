"""Ray clusters for tests: several nodes on this machine, which notice a death within seconds."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

# What workers inherit: one thread each, as more than cores would only wait, and the toys' folder.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
)

STORE_BYTES = 80 * 1024 * 1024  # Ray's least is 75 MiB
HEALTH_CHECK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}


@contextmanager
def cluster_of(nodes: int, *, head_cpus: int = 1, can_spill: bool = True) -> Iterator[Cluster]:
    """Run a cluster of nodes with one CPU each; the first one is the head.

    With `head_cpus` 0 no worker is on the node that cannot be removed. Without `can_spill` Ray
    takes the disk for full.
    """
    disk = {} if can_spill else {"local_fs_capacity_threshold": 1e-6}
    folder = tempfile.mkdtemp(prefix="bachvid-", dir="/tmp")  # short: sockets lie in it
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": head_cpus,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "_system_config": HEALTH_CHECK | disk,
            "temp_dir": folder,
        },
    )
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def workers_of(cluster: Cluster) -> list[int]:
    """Find the processes of our workers on a cluster, and those that no cluster has any more."""
    found = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        title = (process.info["cmdline"] or [""])[0]
        if title.startswith("ray::RayWorker"):
            try:
                raylet = " ".join(psutil.Process(process.info["ppid"]).cmdline())
            except psutil.NoSuchProcess:
                continue
            if cluster.address in raylet or process.info["ppid"] == 1:
                found.append(process.pid)
    return found


def wait_until(is_so: Callable[[], bool], *, seconds: float) -> bool:
    """Wait for something to become true; return whether it did."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
