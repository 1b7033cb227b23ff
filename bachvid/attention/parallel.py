"""How the ranks of a gang exchange tensors: Ulysses sequence parallelism, and CFG parallelism.

A gang lives on one machine and its sockets are on the loopback interface. On GPUs xfuser makes the
process groups, over NCCL; on CPUs torch does, over gloo. The all-to-all is yunchang's on both; the
parallel decoder is DistVAE's. Shape suffixes: see `bachvid.attention.control`.
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

from bachvid.attention.groups import pad_rows
from bachvid.errors import LayoutError
from bachvid.layout.gangs import Gang
from bachvid.layout.tokens import TokenLayout


@dataclass(frozen=True, slots=True, eq=False)
class JoinedGroup:
    """The `SequenceGroup` of a process that has joined the other ranks of its gang."""

    rank: int
    size: int
    cfg_rank: int
    cfg_size: int
    _sequence: dist.ProcessGroup
    _cfg: dist.ProcessGroup
    _leave: Callable[[], None]

    def to_heads(self, x_BSHD: Tensor, layout: TokenLayout) -> Tensor:
        if self.size == 1:
            return x_BSHD
        rows = layout.text_tokens + layout.rank_tokens(self.size)
        if x_BSHD.shape[1] != rows:
            raise LayoutError(
                f"attention over {x_BSHD.shape[1]} tokens, but each of {self.size} ranks has "
                f"{rows} of the layout {layout}: render with the video size that the layout was "
                f"made for"
            )
        video_BNHD = self._all_to_all(x_BSHD[:, layout.text_tokens :], 2, 1)
        heads = video_BNHD.shape[2]
        text_BTHD = x_BSHD[:, layout.text_rows, self.rank * heads : (self.rank + 1) * heads]
        return torch.cat([text_BTHD, video_BNHD[:, : layout.video_tokens]], dim=1)

    def to_tokens(self, x_BSHD: Tensor, layout: TokenLayout) -> Tensor:
        if self.size == 1:
            return x_BSHD
        padded = layout.rank_tokens(self.size) * self.size
        video_BNHD = self._all_to_all(pad_rows(x_BSHD[:, layout.video_rows], padded), 1, 2)
        own = layout.rank_positions(self.rank, self.size)
        video_BNHD = video_BNHD[:, : own.stop - own.start]
        if not layout.text_tokens:
            return video_BNHD
        text_BTHD = torch.cat(_all_gather(x_BSHD[:, layout.text_rows], self._sequence), dim=2)
        return torch.cat([text_BTHD, video_BNHD], dim=1)

    def gather_tokens(self, x_BNC: Tensor, num_tokens: int) -> Tensor:
        padded_BNC = pad_rows(x_BNC, -(-num_tokens // self.size))
        return torch.cat(_all_gather(padded_BNC, self._sequence), dim=1)[:, :num_tokens]

    def sum(self, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._sequence)
        return total

    def from_cond(self, x: Tensor) -> Tensor:
        if self.cfg_size == 1:
            return x
        given = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(given, group_src=1, group=self._cfg)
        return given

    def gather_branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        uncond, cond = _all_gather(x, self._cfg)
        return uncond, cond

    def close(self) -> None:
        """Leave the gang; afterwards this process may join another."""
        self._leave()

    def _all_to_all(self, x_BSHD: Tensor, scattered: int, gathered: int) -> Tensor:
        """Split one dimension over the ranks and gather the other; dimension 1 is rows, 2 heads."""
        exchanged: Tensor = SeqAllToAll4D.apply(self._sequence, x_BSHD, scattered, gathered)
        return exchanged


def join_group(gang: Gang, rank: int, *, device: torch.device, init_file: Path) -> JoinedGroup:
    """Join the other ranks of a gang; returns when all of them have.

    They rendezvous at `init_file`, which must not exist yet and belongs to this gang only. A
    process can be in one gang at a time.
    """
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    method = f"file://{init_file.absolute()}"
    join = _join_on_gpu if device.type == "cuda" else _join_on_cpu
    sequence, cfg, leave = join(gang, rank, device, method)
    cfg_rank, sequence_rank = divmod(rank, gang.sequence)
    return JoinedGroup(sequence_rank, gang.sequence, cfg_rank, gang.cfg, sequence, cfg, leave)


def share_decoder(vae: nn.Module) -> bool:
    """Split the decoder of this process's gang by rows of pixels, if DistVAE supports it.

    Returns whether it does; then every rank must decode what the others decode. DistVAE supports
    the VAE of Wan, but not that of CogVideoX.
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
    # Every rank makes every group in the same order, also those that it is not in.
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
