"""What an identity video leaves to the frame videos of its scene: a manifest, and pieces.

Knows no model and no method, and imports no torch. Shape suffixes: see `bachvid.attention.control`.
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
    """The pieces of one site, of a rank's heads: [B, M, H, D] each, queries and keys before RoPE.

    M are all video rows or, with `positions_M` (int64, rising), those of these positions.
    """

    site: AttentionSite
    pieces: Mapping[Kind, Tensor]
    positions_M: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces.values())


def format_site(site: AttentionSite) -> str:
    """Return a site as messages name it."""
    return f"step {site.step}, layer {site.layer}, branch {site.branch}"


def have_same_rows(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two `positions_M` are the same row set; None is the set of all rows."""
    if first is None or second is None:
        return first is second
    return first is second or first.equal(second)


class PieceSink(Protocol):
    """Takes what a run records."""

    def put(self, shard: Shard) -> None:
        """Keep a shard and own its tensors; one of the same site is replaced."""


class PieceSource(Protocol):
    """Gives what was recorded.

    A run announces the recorded steps that it reads, in its order of reading; a step may come
    twice. Of a step it reads the sites in the order of `Records.sites`, forward by forward.
    """

    def begin(self, steps: Sequence[int]) -> None:
        """Announce what the next run reads, so that a source that pulls can be ahead."""

    def get(self, site: AttentionSite) -> Shard:
        """Return the shard of a recorded site, to be read before the next layer's is asked for.

        Raises CacheMissError if there is none.
        """


class MemoryPieces:
    """Shards in the host memory of this process: a sink and a source."""

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
    """What a reader of an identity cache must agree with, and what was seen of the video.

    `foreground_mask_N` is bool, True is character; `features` are attention outputs [N, C] at the
    mask step, by match layer. Both lie in host memory; None and {} if the method takes none.
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
        """Check once, before a frame video, that it will find all that it reads.

        Raises:
            LayoutError: if the frame video has other tokens than the identity video.
            CacheMissError: if pieces or features are missing, or the config is another one.
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
    """The manifest of a scene's identity video, and where its pieces come from."""

    manifest: IdentityManifest
    source: PieceSource
