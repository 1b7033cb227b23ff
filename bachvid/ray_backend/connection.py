"""Connects to a Ray cluster and reads which machines it has.

Imported lazily: importing Ray takes half a second.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import worker as ray_process
from ray.exceptions import RayError

from bachvid.errors import ConfigError
from bachvid.planning.nodes import ClusterFacts

LOCAL = "local"

_SECONDS = 5  # to wait for a head node to answer
# What workers on other nodes need of the driver's environment; Ray forwards nothing by itself.
_FORWARDED = ("HF_", "NCCL_", "TORCH_NCCL_", "CUDA_DEVICE_", "BACHVID_")


@contextmanager
def ray_connection(address: str) -> Iterator[ClusterFacts]:
    """Connect to the cluster at `address` ("local": start one, and stop it after the block).

    If this process has called `ray.init` itself, it stays connected and `address` is ignored.
    Raises ConfigError if there is no cluster.
    """
    if ray.is_initialized():
        yield _facts()
        return
    with _silent_ray():
        _connect(address)
        try:
            yield _facts()
        finally:
            ray.shutdown()


def read_cluster(address: str) -> ClusterFacts:
    """Return the machines of a cluster. Raises ConfigError if there is none."""
    with ray_connection(address) as facts:
        return facts


def _facts() -> ClusterFacts:
    return ClusterFacts.from_ray(ray.nodes())


def _connect(address: str) -> None:
    _check_answers(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    names = [name for name in os.environ if name.startswith(_FORWARDED)]
    options: dict[str, Any] = {
        "address": address,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {name: os.environ[name] for name in names}},
    }
    if address == LOCAL:
        options["include_dashboard"] = False
    try:
        with _own_signal_handlers(), _loopback_if(address == LOCAL):
            ray.init(**options)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ConfigError(
            f"--address {address}: no Ray cluster answers: {reason}; give the address of a head "
            f'node (host:port), "auto" on a machine of the cluster, or "local"'
        ) from error


def _check_answers(address: str) -> None:
    """Try the address first: Ray waits over ten minutes for a head node that is not there."""
    if address in ("auto", LOCAL):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ConfigError(
            f'--address {address}: must be "auto", "local" or host:port of a head node, as '
            f"10.0.0.1:6379; ray:// is not supported"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--address {address}: no Ray cluster answers: {error}; see whether `ray status "
            f"--address {address}` works on this machine"
        ) from error


@contextmanager
def _silent_ray() -> Iterator[None]:
    """Keep Ray's page of messages about a lost node off the terminal.

    Private: `log_to_driver=False` stops what workers print, not this.
    """
    ray_process._worker_logs_enabled = False
    try:
        yield
    finally:
        ray_process._worker_logs_enabled = True


@contextmanager
def _loopback_if(is_local: bool) -> Iterator[None]:
    """Let a cluster of this machine listen on loopback only, so that nobody else can connect.

    Private: Ray does so where it supports no clusters, and reads its variable for that,
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER, when it is imported. It ignores an address of 127.0.0.1.
    """
    supported = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = supported and not is_local
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = supported


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the handlers of this process: `ray.init` installs its own for SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
