"""Hugging Face folders written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.progress import track
from safetensors.torch import save_file

from opd_megatron.errors import WeightsError

INDEX_NAME = "model.safetensors.index.json"
PROVENANCE = "conversion.json"
"""What a converted folder was made from, and how."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling to write into; it becomes `out` when the block ends well and vanishes when it does not.

    Raises:
        WeightsError: `out` is a file, or a folder with something in it.
    """
    out = Path(os.path.abspath(out))
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise WeightsError(f"output {str(out)!r} exists and is not an empty folder: give a new path or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if out.is_dir():
            out.rmdir()  # empty, as checked; rename onto an existing folder is not portable
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    *,
    max_shard_size: str | int = "2GB",
    progress: bool = False,
) -> None:
    """Writes `load(name)` for every name, one file of at most `max_shard_size` at a time in memory.

    Layout and file names are transformers': `model.safetensors`, or numbered shards and their index.
    """
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()},
        max_shard_size=max_shard_size,
    )
    names = track(list(shapes), description=f"writing {folder.name.strip('.').split('.')[0]}", disable=not progress)
    steps = iter(names)
    for filename, members in plan.filename_to_tensors.items():
        tensors = {}
        for name in members:
            tensors[name] = load(name).to(dtype).contiguous()
            assert tuple(tensors[name].shape) == tuple(shapes[name]), name
            next(steps)
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        (folder / filename).chmod(0o666 & ~_umask())  # safetensors makes it readable by the owner only
    next(steps, None)  # lets the bar finish
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
