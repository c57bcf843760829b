"""Where a bucket lies between the rank that has it and the engines of its node."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self

import torch

from opd_megatron.types import Bucket
from opd_megatron.weight_sync.bucket_buffers import BucketBuffers
from opd_megatron.weight_sync.bucket_files import BucketFiles
from opd_megatron.weight_sync.format import WeightFormat


class BucketStore(Protocol):
    """Puts buckets where the processes of a node find them, under a path; hard links to it are as good."""

    def write(self, bucket: Bucket) -> Path:
        """Raises OSError where there is no room."""

    def read(self, path: Path) -> torch.Tensor:
        """[bytes] uint8: a bucket as it is sent to another node, whoever of this node has written it."""

    def store(self, values: torch.Tensor) -> Path:
        """Puts down what `read` gave elsewhere."""

    def size(self, path: Path) -> int:
        """Bytes of `read`."""

    def close(self) -> None:
        """Frees everything. Safe to call twice; the next `write` starts afresh."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def bucket_store(takes: WeightFormat, device: torch.device, writers: int = 1) -> BucketStore:
    """The kind that an engine reads. `writers`: how many ranks of this host write at the same time."""
    return BucketBuffers(takes.dtype, device) if takes.maps_memory else BucketFiles(takes.dtype, writers)
