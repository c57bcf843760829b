"""Tensors that lie in the host's memory while their GPU's is wanted by others."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

_Storage = torch.UntypedStorage


class HostMemory:
    """Moves the memory of tensors into the host's and back. Tensors, and views of them, stay the same objects: between
    the two they must not be touched.

    The copies are pinned, which a transfer at the link's speed needs, and kept from one time to the next.
    """

    def __init__(self) -> None:
        self._copies: dict[_Storage, torch.Tensor] = {}
        self._away: list[_Storage] = []
        self._lock = threading.Lock()

    def move_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copies and frees the memory that the tensors lie in. Does nothing while something is out already."""
        with self._lock:
            if self._away:
                return
            # Two tensors may share one memory.
            storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
            self._away = [storage for storage in storages.values() if storage.nbytes()]
            for storage in self._away:
                self._copy_of(storage).copy_(_bytes(storage), non_blocking=True)
            _wait()
            for storage in self._away:
                storage.resize_(0)

    def move_back(self) -> None:
        """Takes memory again and puts everything there. Does nothing when nothing is out."""
        with self._lock:
            for storage in self._away:
                copy = self._copy_of(storage)
                storage.resize_(copy.nbytes)
                _bytes(storage).copy_(copy, non_blocking=True)
            _wait()
            self._away = []

    def _copy_of(self, storage: _Storage) -> torch.Tensor:
        if storage not in self._copies:
            pinned = storage.device.type == "cuda"
            self._copies[storage] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
        return self._copies[storage]


def _bytes(storage: _Storage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
