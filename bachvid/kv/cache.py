"""What the frame videos of a scene reuse of its identity video: a manifest, and pieces.

Depends on no model, no method and no torch. Shape suffixes: see `bachvid.attention.control`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bachvid.errors import CacheMissError, LayoutError
from bachvid.layout.records import AttentionSite, Kind, Records
from bachvid.layout.tokens import TokenLayout

if TYPE_CHECKING:
    from torch import Tensor

SAME_CONFIG = "render the identity video and its frame videos with the same story and config"


@dataclass(frozen=True, slots=True)
class Shard:
    """The pieces of one site, for a rank's heads: [B, M, H, D] each, queries and keys before RoPE.

    M rows: all video rows or, with `positions_M` (int64, ascending), those at these positions.
    """

    site: AttentionSite
    pieces: Mapping[Kind, Tensor]
    positions_M: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces.values())


def format_site(site: AttentionSite) -> str:
    """Format a site for messages."""
    return f"step {site.step}, layer {site.layer}, branch {site.branch}"


def have_same_rows(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two `positions_M` are the same row set; None means all rows."""
    if first is None or second is None:
        return first is second
    return first is second or first.equal(second)


class PieceSink(Protocol):
    """Stores what a run records."""

    def put(self, shard: Shard) -> None:
        """Keep a shard and own its tensors; one of the same site is replaced."""


class PieceSource(Protocol):
    """Returns what was recorded.

    A run announces the recorded steps that it will read, in reading order; a step may appear
    twice. Within a step it reads the sites in the order of `Records.sites`, forward by forward.
    """

    def begin(self, steps: Sequence[int]) -> None:
        """Announce what the next run will read, so that a source that pulls can work ahead."""

    def get(self, site: AttentionSite) -> Shard:
        """Return the shard of a recorded site. It is valid until the next layer's is requested.

        Raises CacheMissError if there is none.
        """


class MemoryPieces:
    """Keeps shards in the host memory of this process: a sink and a source."""

    def __init__(self) -> None:
        self._shards: dict[AttentionSite, Shard] = {}

    def put(self, shard: Shard) -> None:
        """Keep a shard and own its tensors; one of the same site is replaced."""
        pieces = {kind: piece.cpu() for kind, piece in shard.pieces.items()}
        positions_M = None if shard.positions_M is None else shard.positions_M.cpu()
        self._shards[shard.site] = Shard(shard.site, pieces, positions_M)

    def begin(self, steps: Sequence[int]) -> None:
        """Do nothing: every shard is here already."""

    def get(self, site: AttentionSite) -> Shard:
        """Return the shard of a recorded site. Raises CacheMissError if there is none."""
        try:
            return self._shards[site]
        except KeyError:
            raise CacheMissError(
                f"nothing was recorded at {format_site(site)}: there are {self._inventory()}; "
                f"{SAME_CONFIG}"
            ) from None

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self._shards.values())

    def _inventory(self) -> str:
        if not self._shards:
            return "no shards"
        steps, layers, branches = (sorted(set(part)) for part in zip(*self._shards, strict=True))
        return f"steps {steps}, layers {layers}, branches {branches}"


@dataclass(frozen=True, slots=True)
class IdentityManifest:
    """What a reader must agree with, and what the pre-pass found in the identity video.

    `foreground_mask_N` is bool, True is character; `features` are attention outputs [N, C] at the
    mask step, by match layer. Both are in host memory; None and {} if the method uses none.
    """

    layout: TokenLayout
    records: Records
    foreground_mask_N: Tensor | None
    features: Mapping[int, Tensor]
    seed: int
    config_hash: str

    def check(
        self,
        layout: TokenLayout,
        *,
        records: Records,
        match_layers: tuple[int, ...],
        config_hash: str,
    ) -> None:
        """Check, before a frame video starts, that it will find everything it reads.

        Raises:
            LayoutError: if the frame video has another token layout than the identity video.
            CacheMissError: if pieces or features are missing, or the config differs.
        """
        if layout != self.layout:
            raise LayoutError(
                f"the frame video has the token layout {layout}, the identity video {self.layout}: "
                f"tokens must correspond; render both with the same `video` section and model"
            )
        wanted: dict[str, tuple[Sequence[object], Sequence[object]]] = {
            "steps": (records.steps, self.records.steps),
            "layers": (records.layers, self.records.layers),
            "branches": (records.branches, self.records.branches),
            "match layers": (match_layers, tuple(self.features)),
        }
        for name, (needed, held) in wanted.items():
            missing = [part for part in needed if part not in held]
            if missing:
                raise CacheMissError(
                    f"the identity cache lacks {name} {missing}: it holds {list(held)}; "
                    f"{SAME_CONFIG}"
                )
        lost = {piece for step in records.steps for piece in records.pieces(step)} - {
            piece for step in self.records.steps for piece in self.records.pieces(step)
        }
        if lost:
            site, kind = min(lost)
            raise CacheMissError(
                f"the identity cache lacks the {kind} of {format_site(site)}; {SAME_CONFIG}"
            )
        if config_hash != self.config_hash:
            raise CacheMissError(
                f"the identity cache was recorded under config {self.config_hash[:12]}, the frame "
                f"video renders under {config_hash[:12]}: their pixels would differ; {SAME_CONFIG}"
            )


@dataclass(frozen=True, slots=True)
class SceneCache:
    """The manifest of a scene's identity video, and the source of its pieces."""

    manifest: IdentityManifest
    source: PieceSource
