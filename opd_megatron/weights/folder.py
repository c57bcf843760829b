"""Hugging Face folders written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.progress import track

from opd_megatron.errors import OPDError, WeightsError

INDEX_NAME = "model.safetensors.index.json"
PROVENANCE = "conversion.json"
"""What a converted folder was made from, and how."""
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A sibling to write into; it becomes `out` when the block ends well and vanishes when it does not.

    A process that is killed leaves the sibling, `.NAME.partial`, behind; the next attempt starts it afresh.

    Raises:
        WeightsError: `out` is a file, or a folder with something in it; or the disk refused (full, no rights).
    """
    out = Path(os.path.abspath(out))
    try:
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise WeightsError(f"output {str(out)!r} exists and is not an empty folder: give a new path or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(out) as partial:
            yield partial
            if out.is_dir():
                out.rmdir()  # empty, as checked; rename onto an existing folder is not portable
            partial.rename(out)
    except OSError as error:
        if isinstance(error, OPDError):
            raise
        raise WeightsError(f"cannot write {str(out)!r}: check space and rights ({error})") from error


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """An empty `.NAME.partial` beside `out`, removed at the end of the block unless it was renamed."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    """Safetensors files of known shapes and one dtype, filled tensor by tensor in any order.

    Every place is known beforehand, so nothing is kept in memory. Leaving the `with` block without an error flushes
    the files to disk.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, max_shard_size: str | int
    ) -> None:
        self._folder, self._shapes, self._dtype = folder, shapes, dtype
        self._plan = split_torch_state_dict_into_shards(
            {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()},
            max_shard_size=max_shard_size,
        )
        self._places: dict[str, tuple[str, int]] = {}
        self._headers: dict[str, bytes] = {}
        for filename, members in self._plan.filename_to_tensors.items():
            self._lay_out(filename, members)
        self._missing = set(shapes)
        self._streams: dict[str, BinaryIO] = {}

    def __enter__(self) -> SafetensorsWriter:
        for filename, header in self._headers.items():
            self._streams[filename] = (self._folder / filename).open("wb", buffering=0)
            _write_all(self._streams[filename], header)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with ExitStack() as closing:
            for stream in self._streams.values():
                closing.enter_context(stream)
            if error is not None:
                return
            assert not self._missing, f"tensors never written: {sorted(self._missing)[:3]}"
            for stream in self._streams.values():
                os.fsync(stream.fileno())
        if self._plan.is_sharded:
            index = {"metadata": self._plan.metadata, "weight_map": self._plan.tensor_to_filename}
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Puts a tensor, cast to the files' dtype, at its place. OSError when the disk refuses."""
        assert tuple(tensor.shape) == tuple(self._shapes[name]), f"{name}: {list(tensor.shape)}"
        self._missing.remove(name)
        filename, offset = self._places[name]
        stream = self._streams[filename]
        stream.seek(offset)
        data = tensor.detach().to("cpu", self._dtype).contiguous().reshape(-1).view(torch.uint8)
        _write_all(stream, data.numpy().data)

    def _lay_out(self, filename: str, members: Sequence[str]) -> None:
        """Header and places: 8 bytes of header length, the header as JSON padded to 8 bytes, the tensors."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in members:
            offsets[name], end = end, end + math.prod(self._shapes[name]) * self._dtype.itemsize
            header[name] = {
                "dtype": _DTYPE_NAMES[self._dtype], "shape": list(self._shapes[name]),
                "data_offsets": [offsets[name], end],
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._headers[filename] = len(text).to_bytes(8, "little") + text
        start = len(self._headers[filename])
        self._places |= {name: (filename, start + offset) for name, offset in offsets.items()}


def _write_all(stream: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view) > 0:
        view = view[stream.write(view) :]


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
