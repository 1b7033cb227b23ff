"""Counts the bytes of tensors while real code runs on the meta device: nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Follows the storages that are made within it; `peak` is their largest sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
        self.peak = self._live = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        for given in _tensors((args, kwargs)):
            self._seen.setdefault(given.untyped_storage(), True)
        result = func(*args, **(kwargs or {}))
        for made in _tensors(result):
            storage = made.untyped_storage()
            if storage not in self._seen:
                self._seen[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, num_bytes: int) -> None:
        self._live += num_bytes
        self.peak = max(self.peak, self._live)


class FusedKernels(TorchFunctionMode):
    """Gives what is one kernel on a GPU its result alone; the meta device would take it apart."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if func is F.scaled_dot_product_attention:
            query_BHSD: Tensor = args[0]
            batch, heads, rows, channels = query_BHSD.shape
            return query_BHSD.new_empty(batch, rows, heads, channels).transpose(1, 2)
        if func in (F.rms_norm, torch.rms_norm):
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
