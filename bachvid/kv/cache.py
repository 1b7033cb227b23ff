"""The identity cache: keys and values of the identity video, and what its reader must agree with.

Knows no model and no method. Shape suffixes: see `bachvid.attention.attend`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bachvid.attention.control import AttentionSite
from bachvid.errors import CacheMissError, LayoutError
from bachvid.layout.gangs import Branch
from bachvid.layout.tokens import TokenLayout

SAME_CONFIG = "render the identity video and its frame videos with the same story and config"


@dataclass(frozen=True, slots=True)
class KVShard:
    """Keys and values of one site: video rows only, keys before RoPE."""

    site: AttentionSite
    key_BMHD: Tensor
    value_BMHD: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and the values."""
        return self.key_BMHD.nbytes + self.value_BMHD.nbytes


class KVStore(Protocol):
    """Where the shards of one identity video lie.

    A run of a frame video reads the steps that it announced in rising order; within a step the
    layers in rising order, within a layer the branches in the order of `IdentityCache.branches`.
    """

    def put(self, shard: KVShard) -> None:
        """Keep a shard and own its tensors; one of the same site is replaced."""

    def begin(self, steps: Sequence[int]) -> None:
        """Announce the steps that the next run reads, so that a store that pulls can be ahead."""

    def get(self, site: AttentionSite) -> KVShard:
        """Return the shard of `site`, to be read before the next layer's is asked for.

        Raises CacheMissError if there is none.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""


class MemoryKVStore:
    """Shards in the host memory of this process."""

    def __init__(self) -> None:
        self._shards: dict[AttentionSite, KVShard] = {}

    def put(self, shard: KVShard) -> None:
        """Keep a shard and own its tensors; one of the same site is replaced."""
        kept = KVShard(shard.site, shard.key_BMHD.cpu(), shard.value_BMHD.cpu())
        self._shards[shard.site] = kept

    def begin(self, steps: Sequence[int]) -> None:
        """Do nothing: every shard is here already."""

    def get(self, site: AttentionSite) -> KVShard:
        """Return the shard of `site`. Raises CacheMissError if there is none."""
        try:
            return self._shards[site]
        except KeyError:
            raise CacheMissError(
                f"no identity keys and values for step {site.step}, layer {site.layer}, branch "
                f"{site.branch}: the store holds {self._inventory()}; {SAME_CONFIG}"
            ) from None

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self._shards.values())

    def _inventory(self) -> str:
        if not self._shards:
            return "nothing"
        steps, layers, branches = (sorted(set(part)) for part in zip(*self._shards, strict=True))
        return f"steps {steps}, layers {layers}, branches {branches}"


@dataclass(frozen=True, slots=True)
class IdentityCache:
    """What an identity video leaves behind for the frame videos of its scene.

    `foreground_mask_N` is bool, True is character. `features` are attention outputs [N, C] at
    the mask step, one for each match layer. Both lie in host memory.
    """

    layout: TokenLayout
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    branches: tuple[Branch, ...]
    foreground_mask_N: Tensor
    features: Mapping[int, Tensor]
    seed: int
    config_hash: str
    store: KVStore

    def check(
        self,
        layout: TokenLayout,
        *,
        steps: tuple[int, ...],
        layers: tuple[int, ...],
        branches: tuple[Branch, ...],
        match_layers: tuple[int, ...],
        config_hash: str,
    ) -> None:
        """Check once, before a frame video, that it will find all that it reads.

        Raises:
            LayoutError: if the frame video has other tokens than the identity video.
            CacheMissError: if steps, layers, branches or features are missing, or the config
                is another one.
        """
        if layout != self.layout:
            raise LayoutError(
                f"the frame video has the token layout {layout}, the identity video {self.layout}: "
                f"tokens must correspond; render both with the same `video` section and model"
            )
        wanted = {
            "steps": (steps, self.steps),
            "layers": (layers, self.layers),
            "branches": (branches, self.branches),
            "match layers": (match_layers, tuple(self.features)),
        }
        for name, (needed, held) in wanted.items():
            missing = sorted(set(needed) - set(held))
            if missing:
                raise CacheMissError(
                    f"the identity cache lacks {name} {missing}: it holds {sorted(held)}; "
                    f"{SAME_CONFIG}"
                )
        if config_hash != self.config_hash:
            raise CacheMissError(
                f"the identity cache was recorded under config {self.config_hash[:12]}, the frame "
                f"video renders under {config_hash[:12]}: their pixels would differ; {SAME_CONFIG}"
            )
