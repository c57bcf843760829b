"""Shard to shard on one host: each tensor-parallel rank of the trainer puts down what one engine worker takes up, in
a file or in memory that the worker maps (`bucket_store`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from opd_megatron.errors import RolloutError
from opd_megatron.types import Bucket
from opd_megatron.weight_sync.bucket_store import BucketStore
from opd_megatron.weight_sync.format import ShardFiles

Value = TypeVar("Value")


class ShardFileTransport:
    """One rank's end of it. Every method is a collective over `group`."""

    def __init__(self, group: ProcessGroup, store: BucketStore) -> None:
        """
        Args:
            group: gloo group of one stage's tensor-parallel ranks, in the order of the engine's workers; its rank 0
                talks to the engine.
            store: this rank's.
        """
        self._group = group
        self._store = store

    def reaches_all(self) -> bool:
        """Whether every rank's files can be read where the engine runs (the host of rank 0); the same on all ranks."""
        path = self._store.write([("probe", torch.zeros(1))])
        paths = _gathered(str(path), self._group)
        seen = _gathered([Path(p).is_file() for p in paths], self._group)[0]
        self.close()
        return all(seen)

    def close(self) -> None:
        """Frees what this rank has put down, which the engines must have read. Not a collective."""
        self._store.close()

    def stream(self, buckets: Iterator[Bucket]) -> Iterator[ShardFiles]:
        """Writes every bucket; only rank 0 yields file paths. Iterate to the end on every rank.

        At most two files of a rank exist at a time: the next bucket is written when rank 0 asks for it, which it does
        when the engine has loaded all but the last. Raises RolloutError on rank 0, after the last bucket, when a rank
        could not write.
        """
        self.close()  # what an engine that died did not read
        failure: str | None = None
        written: deque[str] = deque()
        for bucket in buckets:
            if failure is not None:
                continue  # the ranks of other stages still send
            dist.barrier(self._group)
            if len(written) == 2:
                Path(written.popleft()).unlink(missing_ok=True)  # it is there when the engine died
            outcomes = _gathered(self._write(bucket), self._group)
            failure = next((error for _, error in outcomes if error), None)
            written.append(outcomes[self._group.rank()][0])
            if failure is None and self._group.rank() == 0:
                yield ShardFiles(tuple(Path(path) for path, _ in outcomes))
        if failure is not None and self._group.rank() == 0:
            raise RolloutError(f"a rank could not write its weights for the engine: {failure}: make room in /dev/shm")

    def _write(self, bucket: Bucket) -> tuple[str, str]:
        """(path, error), one of them empty."""
        try:
            return str(self._store.write(bucket)), ""
        except Exception as error:
            return "", f"{type(error).__name__}: {' '.join(str(error).split())}"


def _gathered(value: Value, group: ProcessGroup) -> list[Value]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
