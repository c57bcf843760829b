"""What an engine takes as weights, and what it is given: the contract between the publisher and the engines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from safetensors.torch import load_file

from opd_megatron.types import Bucket


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """One bucket, sharded as a tensor-parallel engine shards it."""

    paths: tuple[Path, ...]
    """Of a `bucket_store.BucketStore` on the engine's node; what is at i is for worker i, and is removed when read."""


@dataclass(frozen=True, slots=True)
class SharedFiles:
    """One bucket for all engines of a node, in memory once."""

    paths: tuple[Path, ...]
    """One for full Hugging Face tensors, or one for each worker as in `ShardFiles`. They are there until the next
    payload is asked for."""

    def own(self) -> ShardFiles:
        """The same bytes under names of one engine's own, which go when they are read."""
        names = [path.with_name(f"{path.stem}.{uuid4().hex}{path.suffix}") for path in self.paths]
        for path, name in zip(self.paths, names, strict=True):
            os.link(path, name)
        return ShardFiles(tuple(names))


WeightPayload = Bucket | ShardFiles | SharedFiles
"""One piece of a weight sync: a bucket of full Hugging Face tensors, or the files of one."""


def tensors_of(payload: WeightPayload) -> Bucket:
    """The tensors of a payload, for an engine whose `WeightFormat` asks for full tensors."""
    if isinstance(payload, SharedFiles):
        [path] = payload.paths
        return list(load_file(path).items())
    assert isinstance(payload, Sequence), f"the engine takes full tensors, not {type(payload).__name__}"
    return payload


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What an engine says about the weights it takes. Known on every rank, from the configuration alone."""

    dtype: torch.dtype
    tp_size: int = 1
    """Workers that each hold a tensor-parallel shard."""
    maps_memory: bool = False
    """Whether its processes map the memory that a bucket is in, rather than read a file of it."""
    vocab_rows: int | None = None
    """Rows of embedding and head on each worker but the last, for an engine that takes `ShardFiles`; None for one that
    takes full tensors only."""
