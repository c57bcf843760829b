"""Safetensors files of known shapes, filled in any order by one process or several."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.progress import track

from opd_megatron.weights.hf_reader import SAFETENSORS_DTYPES

INDEX_NAME = "model.safetensors.index.json"
PROVENANCE = "conversion.json"
"""What a converted folder was made from, and how."""
_COPY_BYTES = 32 * 2**20
"""Cast and written at a time: what writing needs beyond the tensors."""
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    *,
    max_shard_size: str | int = "2GB",
    progress: bool = False,
) -> None:
    """Writes `load(name)` for every name, one tensor at a time in memory.

    Layout and file names are transformers': `model.safetensors`, or numbered shards and their index.
    """
    description = f"writing {folder.name.strip('.').split('.')[0]}"
    with SafetensorsWriter(folder, shapes, dtype, max_shard_size=max_shard_size) as writer:
        for name in track(list(shapes), description=description, disable=not progress):
            writer.write(name, load(name))


class SafetensorsWriter:
    """Safetensors files of known shapes and one dtype, filled in any order, by one process or several.

    Every place is known beforehand, so nothing is kept in memory. With several processes the one that has `creates`
    makes the files; the others enter the `with` block when it has. Leaving the block without an error flushes to disk.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        *,
        max_shard_size: str | int,
        creates: bool = True,
    ) -> None:
        self._folder, self._shapes, self._dtype, self._creates = folder, shapes, dtype, creates
        self._plan = split_torch_state_dict_into_shards(
            {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()},
            max_shard_size=max_shard_size,
        )
        self._places: dict[str, tuple[str, int]] = {}
        self._descriptors: dict[str, int] = {}
        for filename, members in self._plan.filename_to_tensors.items():
            header, size = self._lay_out(filename, members)
            if creates:
                self._create(filename, header, size)
        if creates and self._plan.is_sharded:
            index = {"metadata": self._plan.metadata, "weight_map": self._plan.tensor_to_filename}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def __enter__(self) -> SafetensorsWriter:
        for filename in self._plan.filename_to_tensors:
            self._descriptors[filename] = os.open(self._folder / filename, os.O_WRONLY)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with ExitStack() as closing:
            for descriptor in self._descriptors.values():
                closing.callback(os.close, descriptor)
            if error is None:
                for descriptor in self._descriptors.values():
                    os.fsync(descriptor)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Puts a whole tensor, cast to the files' dtype, at its place. OSError when the disk refuses."""
        assert tuple(tensor.shape) == tuple(self._shapes[name]), f"{name}: {list(tensor.shape)}"
        self.write_part(name, tensor.reshape(1) if tensor.dim() == 0 else tensor, dim=0, start=0)

    def write_part(self, name: str, values: torch.Tensor, *, dim: int, start: int) -> None:
        """Puts rows (`dim` 0) or columns (`dim` 1) from index `start` of a tensor. OSError when the disk refuses."""
        shape, width = self._shapes[name], self._dtype.itemsize
        filename, begin = self._places[name]
        descriptor = self._descriptors[filename]
        if dim == 1 and values.shape[1] == shape[1]:  # all columns are whole rows
            dim, start = 0, 0
        row = math.prod(shape[1:]) * width
        step = max(1, _COPY_BYTES * len(values) // max(1, values.numel() * width))
        for first in range(0, len(values), step):
            part = values[first : first + step].detach().to("cpu", self._dtype).contiguous()
            if dim == 0:
                _write_at(descriptor, part, begin + (start + first) * row)
                continue
            column = start * math.prod(shape[2:]) * width
            for index, line in enumerate(part, first):
                _write_at(descriptor, line, begin + index * row + column)

    def _create(self, filename: str, header: bytes, size: int) -> None:
        descriptor = os.open(self._folder / filename, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            with suppress(AttributeError):  # not every system has it
                os.posix_fallocate(descriptor, 0, size)  # a full disk shows before the work, not after
            os.pwrite(descriptor, header, 0)
        finally:
            os.close(descriptor)

    def _lay_out(self, filename: str, members: Sequence[str]) -> tuple[bytes, int]:
        """(header, size of the file)."""
        header, starts, size = safetensors_layout({name: self._shapes[name] for name in members}, self._dtype)
        self._places |= {name: (filename, start) for name, start in starts.items()}
        return header, size


def safetensors_layout(
    shapes: Mapping[str, Sequence[int]], dtype: torch.dtype
) -> tuple[bytes, dict[str, int], int]:  # fmt: skip
    """Lays out a safetensors file: its first bytes (8 of length, the header as JSON padded to 8), the byte at which
    each tensor begins, and its size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return (
        len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}, start + end,
    )  # fmt: skip


def _write_at(descriptor: int, values: torch.Tensor, position: int) -> None:
    view = values.reshape(-1).view(torch.uint8).numpy().data
    while len(view) > 0:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
