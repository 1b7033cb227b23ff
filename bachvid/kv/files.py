"""An identity cache in a directory, to look into and to use again.

    DIR/step-007.safetensors   keys and values of step 7: `<layer>.<branch>.key`, `.value`
    DIR/manifest.safetensors   mask, features and what a reader must agree with; written last

Each file is there whole or not at all, and carries the sums of its tensors. Knows no method, no
model and no Ray. Shape suffixes: see `bachvid.attention.attend`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bachvid.atomic import write_atomically
from bachvid.attention.control import AttentionSite
from bachvid.errors import CacheMissError, CorruptShardError, WorkerError
from bachvid.kv.cache import SAME_CONFIG, IdentityCache, KVShard
from bachvid.kv.packing import sites_of
from bachvid.kv.pieces import checksum
from bachvid.layout.gangs import Branch
from bachvid.layout.tokens import TokenLayout

MANIFEST = "manifest.safetensors"


class FileKVStore:
    """Shards in a directory, one file for each step: written when its last shard is put.

    Memory: the shards of the steps that are not whole yet.
    """

    def __init__(
        self,
        directory: Path,
        *,
        layers: Sequence[int],
        branches: Sequence[Branch],
        config_hash: str,
    ) -> None:
        self._directory = directory
        self._layers, self._branches = tuple(layers), tuple(branches)
        self._config_hash = config_hash
        self._pending: dict[AttentionSite, KVShard] = {}

    @classmethod
    def load(cls, directory: Path) -> IdentityCache:
        """Open the cache that `save` completed; its shards are read when they are asked for.

        Raises:
            CacheMissError: there is none, or a step of it is missing.
            CorruptShardError: its manifest is damaged.
        """
        facts, tensors = _read(directory / MANIFEST)
        store = cls(
            directory,
            layers=facts["layers"],
            branches=facts["branches"],
            config_hash=facts["config_hash"],
        )
        cache = IdentityCache(
            layout=TokenLayout(**facts["layout"]),
            steps=tuple(facts["steps"]),
            layers=tuple(facts["layers"]),
            branches=tuple(facts["branches"]),
            foreground_mask_N=tensors["foreground_mask"],
            features={layer: tensors[f"features.{layer}"] for layer in facts["match_layers"]},
            seed=facts["seed"],
            config_hash=facts["config_hash"],
            store=store,
        )
        store._check_steps(cache.steps)
        return cache

    def save(self, cache: IdentityCache) -> IdentityCache:
        """Write the manifest of a cache whose shards were put here; return the cache on files.

        Raises:
            CacheMissError: a step of it was not put.
            WorkerError: the directory cannot be written.
        """
        self._check_steps(cache.steps)
        facts = {
            "layout": asdict(cache.layout),
            "steps": cache.steps,
            "layers": cache.layers,
            "branches": cache.branches,
            "match_layers": tuple(cache.features),
            "seed": cache.seed,
            "config_hash": cache.config_hash,
        }
        features = {f"features.{layer}": x for layer, x in cache.features.items()}
        tensors = {"foreground_mask": cache.foreground_mask_N, **features}
        _write(self._directory / MANIFEST, tensors, facts)
        return replace(cache, store=self)

    def put(self, shard: KVShard) -> None:
        """Keep a shard and own its tensors; a step that is put again replaces the first.

        Raises WorkerError if the directory cannot be written.
        """
        self._pending[shard.site] = shard
        step = shard.site.step
        sites = sites_of(step, self._layers, self._branches)
        if self._pending.keys() >= set(sites):
            tensors: dict[str, Tensor] = {}
            for site in sites:
                whole = self._pending.pop(site)
                key_name, value_name = _tensor_names(site)
                tensors[key_name], tensors[value_name] = whole.key_BMHD, whole.value_BMHD
            _write(self._path(step), tensors, self._step_facts(step))

    def begin(self, steps: Sequence[int]) -> None:
        """Do nothing: each shard is read when it is asked for."""

    def get(self, site: AttentionSite) -> KVShard:
        """Read the shard of `site`.

        Raises:
            CacheMissError: there is none, or it is of another config.
            CorruptShardError: its file is damaged.
        """
        path = self._path(site.step)
        key_name, value_name = _tensor_names(site)
        if site not in sites_of(site.step, self._layers, self._branches):
            raise CacheMissError(
                f"{path} has no layer {site.layer}, branch {site.branch}: it holds layers "
                f"{list(self._layers)}, branches {list(self._branches)}; {SAME_CONFIG}"
            )
        facts, tensors = _read(path, (key_name, value_name))
        if facts != self._step_facts(site.step):
            raise CacheMissError(
                f"{path} is of step {facts['step']} under config {facts['config_hash'][:12]}, "
                f"wanted is step {site.step} under {self._config_hash[:12]}; {SAME_CONFIG}"
            )
        return KVShard(site, tensors[key_name], tensors[value_name])

    @property
    def nbytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(map(_tensor_bytes, self._directory.glob("step-*.safetensors")))

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:03d}.safetensors"

    def _step_facts(self, step: int) -> dict[str, object]:
        return {"step": step, "config_hash": self._config_hash}

    def _check_steps(self, steps: Sequence[int]) -> None:
        missing = [step for step in steps if not self._path(step).exists()]
        if missing:
            raise CacheMissError(
                f"the identity cache in {self._directory} lacks the files of steps {missing}: "
                f"render its identity video again"
            )


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Write tensors, their sums and `facts`, all of them or nothing."""
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
    path: Path, names: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the facts and the named tensors, or all, and check their sums."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if _text_sum(metadata["header"]) != metadata["header_sum"]:
                raise ValueError("its header was changed")
            header = json.loads(metadata["header"])
            names = list(header["sums"]) if names is None else names
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


def _tensor_names(site: AttentionSite) -> tuple[str, str]:
    name = f"{site.layer}.{site.branch}"
    return f"{name}.key", f"{name}.value"


def _tensor_sum(x: Tensor) -> str:
    """Sum up a tensor's dtype, shape and bytes."""
    return f"{x.dtype} {tuple(x.shape)} {checksum(x.view(torch.uint8).flatten().numpy()).hex()}"


def _text_sum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _tensor_bytes(path: Path) -> int:
    """Return the bytes of a safetensors file behind its header, whose length stands first."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header_bytes
