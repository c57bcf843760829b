"""Buckets on their way to the engine, as safetensors files: in memory (/dev/shm) while that has room, else on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from opd_megatron.system.held_folders import RoomyFolders
from opd_megatron.types import Bucket


class BucketFiles:
    """See `bucket_store.BucketStore`. A bucket is there until its file is removed."""

    def __init__(self, dtype: torch.dtype, writers: int = 1) -> None:
        """`dtype`: the engine's. `writers`: how many ranks of this host write at the same time."""
        self._dtype = dtype
        self._writers = writers
        self._folders = RoomyFolders("opd-weights-")
        self._count = 0

    def __enter__(self) -> BucketFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes every file that is left. Safe to call twice; the next `write` starts afresh."""
        self._folders.remove()

    def write(self, bucket: Bucket) -> Path:
        """Raises OSError (a full disk) or safetensors' own error."""
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in bucket:
            # Rounding here is what the engine would do with it, at half the bytes.
            tensors[name] = tensor.detach().to("cpu", self._dtype).contiguous()
        tensors = _unshared(tensors)
        path = self._new_path(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path)
        return path

    def store(self, values: torch.Tensor) -> Path:
        """Writes the bytes of a bucket down as `read` gave them."""
        path = self._new_path(values.nbytes)
        values.cpu().numpy().tofile(path)
        return path

    def read(self, path: Path) -> torch.Tensor:
        """[size] uint8: the bytes of a bucket."""
        return torch.from_file(str(path), size=self.size(path), dtype=torch.uint8)

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def _new_path(self, size: int) -> Path:
        # Two buckets are on their way at once, and the engine may hold a third until a layer is complete.
        path = self._folders.with_room(4 * size * self._writers) / f"{self._count}.safetensors"
        self._count += 1
        return path


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory, as tied heads do."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result
