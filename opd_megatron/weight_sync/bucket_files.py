"""Buckets on their way to the engine, as safetensors files: in memory (/dev/shm) while that has room, else on disk."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from opd_megatron.system.held_folders import HeldFolder
from opd_megatron.types import Bucket


class BucketFiles:
    """Private folders that go when `close` is called, or with the process."""

    def __init__(self, dtype: torch.dtype, writers: int = 1) -> None:
        """`dtype`: the engine's. `writers`: how many ranks of this host write at the same time."""
        self._dtype = dtype
        self._writers = writers
        self._folders: dict[str, HeldFolder] = {}
        self._count = 0

    def __enter__(self) -> BucketFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes every file that is left. Safe to call twice; the next `write` starts afresh."""
        for folder in self._folders.values():
            folder.remove()
        self._folders.clear()

    def write(self, bucket: Bucket) -> Path:
        """Raises OSError (a full disk) or safetensors' own error."""
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in bucket:
            # Rounding here is what the engine would do with it, at half the bytes.
            tensors[name] = tensor.detach().to("cpu", self._dtype).contiguous()
        tensors = _unshared(tensors)
        path = self.new_path(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path)
        return path

    def new_path(self, size: int) -> Path:
        """A name for a file of `size` bytes."""
        path = self._folder(size) / f"{self._count}.safetensors"
        self._count += 1
        return path

    def _folder(self, size: int) -> Path:
        root = tempfile.gettempdir()
        with contextlib.suppress(OSError):
            # Two buckets are on their way at once, and the engine may hold a third until a layer is complete.
            if shutil.disk_usage("/dev/shm").free > 4 * size * self._writers:
                root = "/dev/shm"
        if root not in self._folders:
            self._folders[root] = HeldFolder("opd-weights-", root)
        return self._folders[root].path


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory, as tied heads do."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result
