"""Buckets on their way to the engine in memory that its processes map: a GPU's (CUDA IPC), or a CPU's.

A bucket is laid out as a safetensors file in one of a few buffers, which are used in turn; nothing passes through the
host. What is handed on by name is a small file that says where the buffer lies, so that such a bucket goes wherever one
of `bucket_files` does.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import torch
from safetensors.torch import load_file

from opd_megatron.system.held_folders import RoomyFolders
from opd_megatron.types import Bucket
from opd_megatron.weights.hf_reader import SAFETENSORS_DTYPES
from opd_megatron.weights.safetensors_writer import safetensors_layout

_IN_TURN = 3
"""Buffers. While one is written every engine may still read the last one, and one of them the one before."""
_SUFFIX, _FILE_ROOM = ".buffer", 2**20
_CUDA_FIELDS = ("device", "handle", "size", "offset", "counter", "counter_offset", "event", "event_sync")
"""What torch tells of a storage that another process is to map."""
_ours: WeakValueDictionary[str, _Buffer] = WeakValueDictionary()
"""This process's own by their keys: CUDA maps nothing into the process that it is of."""


class BucketBuffers:
    """See `bucket_files.BucketStore`. A bucket is there until the third one after it is written."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype`: the engine's. `device`: where the buffers are."""
        self._dtype, self._device = dtype, device
        self._buffers: dict[int, _Buffer] = {}
        """By their turn."""
        self._count = 0
        self._folders = RoomyFolders("opd-weights-")

    def __enter__(self) -> BucketBuffers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the buffers: no engine may be reading. Safe to call twice; the next `write` starts afresh."""
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers.clear()
        self._folders.remove()

    def write(self, bucket: Bucket) -> Path:
        """Raises OSError when a CPU's memory is full, torch.OutOfMemoryError when a GPU's is."""
        tensors = [(name, tensor.detach()) for name, tensor in bucket]
        header, starts, size = safetensors_layout({name: tensor.shape for name, tensor in tensors}, self._dtype)
        buffer = self._next(size)
        buffer.values[: len(header)].copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        for name, tensor in tensors:
            place = buffer.values[starts[name] : starts[name] + tensor.numel() * self._dtype.itemsize]
            place.view(self._dtype).view(tensor.shape).copy_(tensor)
        return self._told(buffer, size)

    def store(self, values: torch.Tensor) -> Path:
        """Takes the bytes of a bucket as `read` gives them."""
        buffer = self._next(values.nbytes)
        buffer.values[: values.nbytes].copy_(values)
        return self._told(buffer, values.nbytes)

    def read(self, path: Path) -> torch.Tensor:
        """[size] uint8, on a GPU where the buffers are on one."""
        return open_buffer(path, self._device)

    def size(self, path: Path) -> int:
        return int(json.loads(path.read_text())["size"])

    def _next(self, size: int) -> _Buffer:
        """The buffer whose turn it is, made anew where it is too small."""
        turn, self._count = self._count % _IN_TURN, self._count + 1
        before = self._buffers.get(turn)
        if before is not None and before.values.nbytes >= size:
            return before
        if before is not None:
            before.free()
        self._buffers[turn] = _Buffer(size, self._device, self._folders.with_room(_IN_TURN * size))
        return self._buffers[turn]

    def _told(self, buffer: _Buffer, size: int) -> Path:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # another process reads it next
        path = self._folders.with_room(_FILE_ROOM) / f"{self._count}{_SUFFIX}"
        path.write_text(json.dumps(buffer.place | {"key": buffer.key, "size": size}))
        return path


class _Buffer:
    """Memory that other processes of this machine can map."""

    def __init__(self, size: int, device: torch.device, folder: Path) -> None:
        self.key = uuid4().hex
        self.place: dict[str, Any]
        self._file: Path | None = None
        if device.type == "cuda":
            self.values = torch.empty(size, dtype=torch.uint8, device=device)
            shared = zip(_CUDA_FIELDS, self.values.untyped_storage()._share_cuda_(), strict=True)
            # The storage may begin inside its block, the tensor begins with the storage.
            self.place = {name: _as_text(value) for name, value in shared}
        else:
            self._file = folder / self.key
            with self._file.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # memory that is not there would end the process later
            self.values = torch.from_file(str(self._file), shared=True, size=size, dtype=torch.uint8)
            self.place = {"file": str(self._file)}
        _ours[self.key] = self

    def free(self) -> None:
        self.values = self.values.new_empty(0)
        if self._file is not None:
            self._file.unlink(missing_ok=True)


class Mappings:
    """The buffers that an engine's worker has mapped, kept from one bucket to the next."""

    def __init__(self) -> None:
        self._mapped: dict[str, torch.Tensor] = {}

    def load(self, path: Path, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of a bucket, whichever way it comes. They are the caller's own: of a buffer, copies on `device`.

        Raises OSError, or RuntimeError when the GPU cannot map another one's memory."""
        if path.suffix != _SUFFIX:
            return load_file(path)
        place = json.loads(path.read_text())
        if place["key"] not in self._mapped:
            self._mapped[place["key"]] = _map(place, device)
        found = {name: tensor.clone() for name, tensor in tensors_in(self._mapped[place["key"]]).items()}
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the trainer writes there again
        return found

    def clear(self) -> None:
        """Lets go of all of them."""
        self._mapped.clear()


def open_buffer(path: Path, device: torch.device) -> torch.Tensor:
    """[size] uint8: the bytes of the bucket that a file of `BucketBuffers` tells of, of this process or another."""
    place = json.loads(path.read_text())
    own = _ours.get(place["key"])
    whole = own.values if own is not None else _map(place, device)
    return whole[: place["size"]]


def tensors_in(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of the tensors in the bytes of a safetensors file, by name."""
    length = int.from_bytes(values[:8].cpu().numpy().tobytes(), "little")
    header = json.loads(values[8 : 8 + length].cpu().numpy().tobytes())
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = values[start:stop].view(SAFETENSORS_DTYPES[entry["dtype"]]).view(entry["shape"])
    return found


def _map(place: dict[str, Any], device: torch.device) -> torch.Tensor:
    """[bytes of the buffer] uint8."""
    if "file" in place:
        size = os.path.getsize(place["file"])
        return torch.from_file(place["file"], shared=True, size=size, dtype=torch.uint8)
    torch.cuda.init()
    # Mapped by the reader's own GPU, which reaches a neighbour's memory: the number of either is another elsewhere.
    arguments = [device.index if name == "device" else _as_bytes(place[name]) for name in _CUDA_FIELDS]
    storage = torch.UntypedStorage._new_shared_cuda(*arguments)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _as_text(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _as_bytes(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else value
