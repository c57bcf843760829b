"""What a computation holds in tensors, counted as they are made and freed."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensors that are made inside the context and alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self._storages = WeakIdKeyDictionary()
        self.peak = 0
        self.largest = 0
        """Bytes of the largest tensor made."""

    def known(self, tensors) -> None:
        """These were there before and do not count."""
        for tensor in tensors:
            self._storages[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._storages:
                    self._storages[storage] = storage.nbytes()
                    self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self._storages.values()))
        return result
