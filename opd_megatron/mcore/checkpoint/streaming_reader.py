"""Reading a torch_dist checkpoint a few MiB at a time: torch's reader holds every stored tensor whole."""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from opd_megatron.errors import WeightsError, is_out_of_memory

_READ_BYTES = 32 * 2**20


class StreamingReader(FileSystemReader):
    """Reads every tensor a few MiB at a time into its place, checks its checksum and names it when it is damaged."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in sorted(plan.items, key=lambda item: self._place(item)):
            info = self.storage_data[item.storage_index]
            path = Path(self.path) / info.relative_path
            try:
                with path.open("rb") as stream:
                    target = planner.resolve_tensor(item).detach()
                    self._read_into(target, item, _Part(stream, info.offset, info.length), planner)
                    planner.commit_tensor(item, target)
            except Exception as error:  # damaged bytes raise anything
                if is_out_of_memory(error):
                    raise
                cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise WeightsError(
                    f"tensor {item.storage_index.fqn!r} in {str(path)!r} cannot be read: the file is damaged, copy the "
                    f"checkpoint again ({cause})"
                ) from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, item: ReadItem) -> tuple[str, int]:
        info = self.storage_data[item.storage_index]
        return info.relative_path, info.offset

    def _read_into(self, target: torch.Tensor, item: ReadItem, stream: Any, planner: Any) -> None:
        """`target` gets the part `item` asks for of the tensor that torch.save wrote to `stream`."""
        stored = planner.metadata.state_dict_metadata[item.storage_index.fqn]
        (shape,) = {tuple(c.sizes) for c in stored.chunks if c.offsets == item.storage_index.offset}
        dim = next((i for i, size in enumerate(shape) if size > 1), 0)  # Megatron puts the layer first, as size 1
        first, length = (item.storage_offsets[dim], item.lengths[dim]) if shape else (0, 1)
        dtype = stored.properties.dtype
        row = max(1, math.prod(shape[dim + 1 :])) * dtype.itemsize
        rows, step = shape[dim] if shape else 1, max(1, _READ_BYTES // row)
        with zipfile.ZipFile(stream) as archive:  # torch.save's format; its reader checks the CRC-32 of what it reads
            (record,) = [name for name in archive.namelist() if name.endswith("/data/0")]
            with archive.open(record) as content:
                for start in range(0, rows, step):
                    count = min(step, rows - start)
                    part = torch.frombuffer(bytearray(content.read(count * row)), dtype=dtype)
                    part = part.view(*shape[:dim], count, *shape[dim + 1 :])
                    low, high = max(start, first), min(start + count, first + length)
                    if low < high:
                        part = part.narrow(dim, low - start, high - low) if shape else part
                        for axis in range(dim + 1, len(shape)):
                            part = part.narrow(axis, item.storage_offsets[axis], item.lengths[axis])
                        target.narrow(dim, low - first, high - low).copy_(part)
                if content.read(1):
                    raise ValueError(f"record longer than shape {list(shape)}")


class _Part(io.RawIOBase):
    """`length` bytes of a file from `offset`, as a file of its own."""

    def __init__(self, stream: BinaryIO, offset: int, length: int) -> None:
        super().__init__()
        self._stream, self._offset, self._length, self._position = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("seek before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._offset + self._position)
        count = max(0, min(len(buffer), self._length - self._position))
        data = self._stream.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
