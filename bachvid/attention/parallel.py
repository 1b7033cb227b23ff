"""How the ranks of a gang exchange what they share: Ulysses sequence parallelism, CFG apart.

A gang is on one machine: its sockets are those of the loopback interface. On GPUs xfuser makes the
groups, over NCCL; on CPUs torch does, over gloo. The all-to-all is yunchang's on both, and the
shared decoder DistVAE's. Shape suffixes: see `bachvid.attention.attend`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from distvae.vae import parallel
from torch import Tensor, nn
from yunchang.comm.all_to_all import SeqAllToAll4D

from bachvid.layout.gangs import Gang


@dataclass(frozen=True, slots=True, eq=False)
class JoinedGroup:
    """The `SequenceGroup` of a process that has met the other ranks of its gang."""

    rank: int
    size: int
    cfg_rank: int
    cfg_size: int
    _sequence: dist.ProcessGroup
    _cfg: dist.ProcessGroup
    _leave: Callable[[], None]

    def to_heads(self, x_BSHD: Tensor) -> Tensor:
        """Return [B, size * S, H / size, D]: all rows of this rank's heads."""
        heads_BSHD: Tensor = SeqAllToAll4D.apply(self._sequence, x_BSHD, 2, 1)
        return heads_BSHD

    def to_tokens(self, x_BSHD: Tensor) -> Tensor:
        """Return [B, S / size, H * size, D]: this rank's rows of all heads."""
        rows_BSHD: Tensor = SeqAllToAll4D.apply(self._sequence, x_BSHD, 1, 2)
        return rows_BSHD

    def gather_heads(self, x_BTHD: Tensor) -> Tensor:
        """Return [B, T, H * size, D]: the heads of all ranks, in order."""
        return torch.cat(_all_gather(x_BTHD, self._sequence), dim=2)

    def gather_tokens(self, x_BNC: Tensor) -> Tensor:
        """Return [B, size * N, C]: the rows of all ranks, in raster order."""
        return torch.cat(_all_gather(x_BNC, self._sequence), dim=1)

    def sum(self, x: Tensor) -> Tensor:
        """Add over the ranks that share a branch: bitwise the same sum on all of them."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._sequence)
        return total

    def from_cond(self, x: Tensor) -> Tensor:
        """Return what the rank of the branch cond has."""
        if self.cfg_size == 1:
            return x
        given = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(given, group_src=1, group=self._cfg)
        return given

    def gather_branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the ranks of uncond and of cond have."""
        uncond, cond = _all_gather(x, self._cfg)
        return uncond, cond

    def close(self) -> None:
        """Leave the gang; afterwards this process may join another."""
        self._leave()


def join_group(gang: Gang, rank: int, *, device: torch.device, init_file: Path) -> JoinedGroup:
    """Meet the other ranks of a gang; returns when all of them are there.

    They meet in `init_file`, which does not exist before and is of this gang only. A process can
    be in one gang at a time.
    """
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    method = f"file://{init_file.absolute()}"
    join = _join_on_gpu if device.type == "cuda" else _join_on_cpu
    sequence, cfg, leave = join(gang, rank, device, method)
    cfg_rank, sequence_rank = divmod(rank, gang.sequence)
    return JoinedGroup(sequence_rank, gang.sequence, cfg_rank, gang.cfg, sequence, cfg, leave)


def share_decoder(vae: nn.Module) -> bool:
    """Let the gang of this process decode together, rows of pixels apart, if DistVAE can.

    Returns whether it can: then every rank must decode what the others do. It knows the VAE of
    Wan, and not that of CogVideoX.
    """
    if parallel.decoder_adapter_name(vae) is None:
        return False
    parallel.parallelize_decoder(vae, dist.group.WORLD)
    return True


_Groups = tuple[dist.ProcessGroup, dist.ProcessGroup, Callable[[], None]]


def _join_on_cpu(gang: Gang, rank: int, device: torch.device, method: str) -> _Groups:
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=gang.size)
    ranks = torch.arange(gang.size).view(gang.cfg, gang.sequence)
    cfg_rank, sequence_rank = divmod(rank, gang.sequence)
    # Every rank makes every group, also those that it is not in, in the same order.
    sequences = [dist.new_group(row.tolist()) for row in ranks]
    cfgs = [dist.new_group(column.tolist()) for column in ranks.T]
    return sequences[cfg_rank], cfgs[sequence_rank], dist.destroy_process_group


def _join_on_gpu(gang: Gang, rank: int, device: torch.device, method: str) -> _Groups:
    from xfuser.core import distributed as xfuser  # raises on a torch without an accelerator

    xfuser.init_distributed_environment(
        rank=rank,
        world_size=gang.size,
        local_rank=device.index or 0,
        distributed_init_method=method,
    )
    xfuser.initialize_model_parallel(
        classifier_free_guidance_degree=gang.cfg,
        sequence_parallel_degree=gang.sequence,
        ulysses_degree=gang.sequence,
    )

    def leave() -> None:
        xfuser.parallel_state.destroy_model_parallel()
        xfuser.parallel_state.destroy_distributed_environment()

    return xfuser.get_sp_group().device_group, xfuser.get_cfg_group().device_group, leave


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return parts
