"""The file transport between two real ranks: bounded files, no rank left behind, whatever happens to the others."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from opd_megatron.errors import RolloutError
from opd_megatron.types import Bucket
from opd_megatron.weight_sync.bucket_files import BucketFiles
from opd_megatron.weight_sync.shard_files import ShardFileTransport
from tests.ranks import run_ranks

BUCKETS = 5
NUMEL = 100_000


def _buckets(rank: int) -> Iterator[Bucket]:
    for i in range(BUCKETS):
        yield [("w", torch.full((NUMEL,), float(10 * rank + i)))]


def _transport(rank: int) -> ShardFileTransport:
    transport = ShardFileTransport(dist.group.WORLD, BucketFiles(torch.float32, writers=2))
    assert transport.reaches_all()
    return transport


def _consume(rank: int, world_size: int, reads: bool) -> tuple[list[list[float]], int]:
    """What rank 0 finds in the files, and how many are there at the most; an engine that died reads none of them."""
    transport, values, most, folders = _transport(rank), [], 0, set()
    loading: tuple[Path, ...] = ()
    for files in transport.stream(_buckets(rank)):
        folders |= {path.parent for path in files.paths}
        most = max(most, sum(len(list(folder.glob("*.safetensors"))) for folder in folders))
        values.append([load_file(path)["w"].unique().item() for path in files.paths])
        for path in loading if reads else ():
            path.unlink()  # as the engine does with the bucket before
        loading = files.paths
    dist.barrier()
    left = sum(len(list(folder.glob("*.safetensors"))) for folder in folders)
    dist.barrier()
    list(transport.stream(iter(())))  # the next sync finds nothing of the last one
    dist.barrier()
    assert not any(folder.exists() for folder in folders)
    assert left <= 4
    return values, most


@pytest.mark.parametrize("reads", [True, False])
def test_rank_0_is_given_every_ranks_file_and_two_buckets_of_each_at_most(reads: bool) -> None:
    (values, most), (nothing, _) = run_ranks(2, _consume, reads)
    assert values == [[float(i), float(10 + i)] for i in range(BUCKETS)]
    assert most == 4
    assert nothing == []


def _full_disk(rank: int, world_size: int) -> tuple[int, str]:
    transport = _transport(rank)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    received, message = 0, ""
    try:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (NUMEL, before[1]))  # bytes: a quarter of a bucket
        for _ in transport.stream(_buckets(rank)):
            received += 1
    except RolloutError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()  # the group must still be in step
    return received, message


def test_a_rank_that_cannot_write_is_one_error_on_rank_0() -> None:
    (received, message), other = run_ranks(2, _full_disk)
    assert received == 0
    assert "could not write its weights" in message
    assert "make room in /dev/shm" in message
    assert "\n" not in message
    assert other == (0, "")
