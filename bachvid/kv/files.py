"""An identity cache in a directory, to inspect and to reuse.

    DIR/step-007.safetensors   pieces of step 7: `<layer>.<branch>.<kind>`; and `positions`, if they
                               are not those of all video rows
    DIR/manifest.safetensors   mask, features and what a reader must agree with; written last

Each file is written atomically and carries the checksums of its tensors. Depends on no method, no
model and not on Ray. Shape suffixes: see `bachvid.attention.control`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bachvid.atomic import write_atomically
from bachvid.errors import CacheMissError, CorruptShardError, WorkerError
from bachvid.kv.cache import SAME_CONFIG, IdentityManifest, Shard, format_site, have_same_rows
from bachvid.kv.pieces import checksum
from bachvid.layout.records import AttentionSite, Kind, Records, RecordSet
from bachvid.layout.tokens import TokenLayout

_MANIFEST = "manifest.safetensors"
_POSITIONS = "positions"
_MASK = "foreground_mask"


class FilePieces:
    """Keeps shards in a directory, one file per step: a sink and a source.

    A file is written when the last shard of its step is put. Memory: the shards of incomplete
    steps.
    """

    def __init__(self, directory: Path, *, records: Records, config_hash: str) -> None:
        self._directory, self._records, self._config_hash = directory, records, config_hash
        self._pending: dict[AttentionSite, Shard] = {}
        self._step_bytes: dict[int, int] = {}

    def put(self, shard: Shard) -> None:
        """Keep a shard and own its tensors; a step that is put again replaces the earlier one.

        Raises WorkerError if the directory cannot be written.
        """
        assert shard.pieces.keys() == set(self._records.kinds(shard.site)), (
            "other kinds than recorded"
        )
        self._pending[shard.site] = shard
        step = shard.site.step
        sites = self._records.sites(step)
        if self._pending.keys() >= set(sites):
            self._write_step(step, [self._pending.pop(site) for site in sites])

    def begin(self, steps: Sequence[int]) -> None:
        """Do nothing: each shard is read when it is asked for."""

    def get(self, site: AttentionSite) -> Shard:
        """Read the shard of `site`.

        Raises:
            CacheMissError: there is none, or it was made with another config or other records.
            CorruptShardError: its file is damaged.
        """
        path = _step_path(self._directory, site.step)
        names = {kind: _tensor_name(site, kind) for kind in self._records.kinds(site)}
        if not names:
            raise CacheMissError(f"nothing is recorded at {format_site(site)}; {SAME_CONFIG}")
        facts, tensors = _read(path, {*names.values(), _POSITIONS})
        if facts != self._step_facts(site.step):
            raise CacheMissError(
                f"{path} is of step {facts['step']} under config {facts['config_hash'][:12]}, "
                f"wanted is step {site.step} under {self._config_hash[:12]}; {SAME_CONFIG}"
            )
        missing = sorted(set(names.values()) - tensors.keys())
        if missing:
            raise CacheMissError(f"{path} lacks the pieces {missing}; {SAME_CONFIG}")
        pieces = {kind: tensors[name] for kind, name in names.items()}
        return Shard(site, pieces, tensors.get(_POSITIONS))

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces written; a step that was put again counts once."""
        return sum(self._step_bytes.values())

    def _write_step(self, step: int, shards: Sequence[Shard]) -> None:
        tensors = {
            _tensor_name(shard.site, kind): piece
            for shard in shards
            for kind, piece in shard.pieces.items()
        }
        positions_M = shards[0].positions_M
        assert all(have_same_rows(shard.positions_M, positions_M) for shard in shards), (
            "the row set is a fixed one"
        )
        if positions_M is not None:
            tensors[_POSITIONS] = positions_M
        _write(_step_path(self._directory, step), tensors, self._step_facts(step))
        self._step_bytes[step] = sum(shard.nbytes for shard in shards)

    def _step_facts(self, step: int) -> dict[str, object]:
        return {"step": step, "config_hash": self._config_hash}


def write_manifest(directory: Path, manifest: IdentityManifest) -> None:
    """Complete a cache whose pieces a `FilePieces` has written to the same directory.

    Raises:
        CacheMissError: the file of a recorded step is not there.
        WorkerError: the directory cannot be written.
    """
    _check_steps(directory, manifest.records)
    facts = {
        "layout": asdict(manifest.layout),
        "records": asdict(manifest.records),
        "match_layers": tuple(manifest.features),
        "seed": manifest.seed,
        "config_hash": manifest.config_hash,
    }
    tensors = {_feature_name(layer): x_NC for layer, x_NC in manifest.features.items()}
    if manifest.foreground_mask_N is not None:
        tensors[_MASK] = manifest.foreground_mask_N
    _write(directory / _MANIFEST, tensors, facts)


def read_manifest(directory: Path) -> IdentityManifest:
    """Return the manifest of a complete cache; a `FilePieces` reads its pieces.

    Raises:
        CacheMissError: there is none, or the file of a recorded step is not there.
        CorruptShardError: it is damaged.
    """
    facts, tensors = _read(directory / _MANIFEST)
    manifest = IdentityManifest(
        layout=TokenLayout(**facts["layout"]),
        records=Records(
            tuple(
                RecordSet(**{name: tuple(values) for name, values in part.items()})
                for part in facts["records"]["sets"]
            )
        ),
        foreground_mask_N=tensors.get(_MASK),
        features={layer: tensors[_feature_name(layer)] for layer in facts["match_layers"]},
        seed=facts["seed"],
        config_hash=facts["config_hash"],
    )
    _check_steps(directory, manifest.records)
    return manifest


def _check_steps(directory: Path, records: Records) -> None:
    missing = [step for step in records.steps if not _step_path(directory, step).exists()]
    if missing:
        raise CacheMissError(
            f"the identity cache in {directory} lacks the files of steps {missing}: render its "
            f"identity video again"
        )


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Write tensors, their checksums and `facts` atomically."""
    whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    sums = {name: _tensor_sum(x) for name, x in whole.items()}
    header = json.dumps({"facts": facts, "sums": sums})
    metadata = {"header": header, "header_sum": _text_sum(header)}
    try:
        write_atomically(path, lambda temporary: save_file(whole, temporary, metadata))
    except (OSError, SafetensorError) as error:
        raise WorkerError(
            f"cannot write the identity cache {path}: {error}; make room there, or set "
            f"cache.directory to another place"
        ) from error


def _read(
    path: Path, wanted: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the facts and the wanted (or all) tensors, and check their checksums."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if _text_sum(metadata["header"]) != metadata["header_sum"]:
                raise ValueError("its header was changed")
            header = json.loads(metadata["header"])
            names = [name for name in header["sums"] if wanted is None or name in wanted]
            tensors = {name: file.get_tensor(name) for name in names}
        for name, x in tensors.items():
            if _tensor_sum(x) != header["sums"][name]:
                raise ValueError(f"its tensor {name} was changed")
    except FileNotFoundError:
        raise CacheMissError(
            f"there is no {path}: render the identity video with cache.directory={path.parent}"
        ) from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptShardError(
            f"{path} is damaged: {error}; delete it and render the identity video again"
        ) from error
    return header["facts"], tensors


def _step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:03d}.safetensors"


def _tensor_name(site: AttentionSite, kind: Kind) -> str:
    return f"{site.layer}.{site.branch}.{kind}"


def _feature_name(layer: int) -> str:
    return f"features.{layer}"


def _tensor_sum(x: Tensor) -> str:
    """Return the checksum of a tensor's dtype, shape and bytes."""
    return f"{x.dtype} {tuple(x.shape)} {checksum(x.view(torch.uint8).flatten().numpy()).hex()}"


def _text_sum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
