"""Weights from rank 0 to the engines of all ranks: every engine gets every byte, each node holds it once."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from opd_megatron.errors import OPDError, RolloutError
from opd_megatron.rollout.side_by_side import fed_from, gathered
from opd_megatron.types import Bucket
from opd_megatron.weight_sync.fan_out import FanOut
from opd_megatron.weight_sync.format import ShardFiles, SharedFiles, WeightPayload
from tests.ranks import run_ranks

BUCKETS = 5
SHAPES = [(3, 4), (1000, 7), (), (5,)]
FLEETS = [
    ([0, 0], [0, 0, 0]),
    ([0, 1, 2], [0, 0, 0]),
    ([1], [0, 0, 0]),
    ([0, 1, 1, 2], [0, 0, 1]),
    ([1, 2], [0, 1, 1]),
    ([0, 1, 2], [0, 1, 2]),
    ([2, 2], [0, 1, 2]),
]
"""The rank of each engine; the node of each rank."""


def _bucket(i: int) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(i)
    return [(f"t{i}.{j}", torch.randn(shape, generator=generator)) for j, shape in enumerate(SHAPES)]


def _collective(rank: int) -> Iterator[WeightPayload]:
    """Each bucket takes all ranks, as a gather of shards does; it comes out on rank 0."""
    for i in range(BUCKETS):
        dist.all_reduce(torch.zeros(1))
        if rank == 0:
            yield _bucket(i)


class Reader:
    """An engine that keeps what it is given, or ends after some buckets."""

    def __init__(self, ends_after: int | None = None) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.folders: set[Path] = set()
        self.most = 0
        self._ends_after = ends_after

    def __call__(self, payloads: Any) -> None:
        for i, payload in enumerate(payloads):
            assert isinstance(payload, SharedFiles)
            own = payload.own()
            self.folders |= {path.parent for path in own.paths}
            self.most = max(self.most, len({inode for folder in self.folders for inode in _inodes(folder)}))
            for path in own.paths:
                self.tensors |= load_file(path)
                path.unlink()
            if i == self._ends_after:
                raise RolloutError("this engine has had enough")


def _inodes(folder: Path) -> Iterator[int]:
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another engine has read it
            yield path.stat().st_ino


def _feed(rank: int, world_size: int, leaders: list[int], nodes: list[int], quits: int | None) -> Any:
    fan_out = FanOut(leaders, nodes, torch.float32)
    expected = dict(pair for i in range(BUCKETS) for pair in _bucket(i))
    for _ in range(2):  # a second sync begins afresh
        readers = {i: Reader() for i, leader in enumerate(leaders) if leader == rank}
        if quits in readers:
            readers[quits] = Reader(ends_after=1)
        outcomes = fed_from(fan_out.stream(_collective(rank)), readers)
        dist.barrier()
        for index, reader in readers.items():
            if index == quits:
                assert "had enough" in str(outcomes[index].error)
                continue
            assert outcomes[index].error is None
            assert reader.tensors.keys() == expected.keys()
            assert all(torch.equal(reader.tensors[name], expected[name]) for name in expected)
            assert reader.most <= 2, "a node holds the bucket that is read and the next one"
            if quits is None:
                left = [str(path) for folder in reader.folders for path in folder.glob("*.safetensors")]
                assert not left, left
        dist.barrier()
    return fan_out.nbytes, threading.active_count()


@pytest.mark.parametrize(("leaders", "nodes"), FLEETS, ids=str)
def test_every_engine_gets_every_tensor_and_each_node_every_byte_once(leaders: list[int], nodes: list[int]) -> None:
    sent = run_ranks(len(nodes), _feed, leaders, nodes, None)
    weights = 2 * BUCKETS * sum(4 * math.prod(shape) for shape in SHAPES)
    heads = {nodes[rank]: rank for rank in sorted({0, *leaders}, reverse=True)}
    for rank, (nbytes, _) in enumerate(sent):
        if rank in heads.values():
            assert weights < nbytes < 1.3 * weights  # with the files' headers
        else:
            assert nbytes == 0


@pytest.mark.parametrize(("leaders", "nodes"), FLEETS, ids=str)
def test_an_engine_that_ends_keeps_nobody_from_the_rest(leaders: list[int], nodes: list[int]) -> None:
    run_ranks(len(nodes), _feed, leaders, nodes, len(leaders) - 1)


@pytest.mark.parametrize(("leaders", "nodes"), [([0, 1, 1], [0, 0]), ([1], [0, 0]), ([0, 1], [0, 1])], ids=str)
def test_an_error_at_the_source_is_one_error_on_every_rank(leaders: list[int], nodes: list[int]) -> None:
    one, other = run_ranks(2, _fail, leaders, nodes)
    assert one == other
    assert "No space left on device" in one


def _fail(rank: int, world_size: int, leaders: list[int], nodes: list[int]) -> str:
    fan_out = FanOut(leaders, nodes, torch.float32)
    readers = {i: Reader() for i, leader in enumerate(leaders) if leader == rank}

    def everything() -> Iterator[Bucket]:
        """What a transport does: it goes on to the end of its collectives, then tells."""
        problem: OSError | None = None
        for i, payload in enumerate(_collective(rank)):
            if i == 2:
                problem = OSError(28, "No space left on device")
            if problem is None:
                yield payload
        if problem is not None and rank == 0:
            raise problem

    try:
        gathered(fed_from(fan_out.stream(everything()), readers), dist.group.WORLD)
    except OPDError as error:
        dist.barrier()  # the group must still be in step
        return str(error)
    return "no error"


def _feed_shards(rank: int, world_size: int, nodes: list[int]) -> list[int]:
    """Files of two workers, as shards have them."""
    from opd_megatron.weight_sync.bucket_files import BucketFiles

    fan_out = FanOut([0, 0, 1], nodes, torch.float32)
    files = BucketFiles(torch.float32)

    def shards() -> Iterator[WeightPayload]:
        for i in range(BUCKETS):
            dist.all_reduce(torch.zeros(1))
            if rank == 0:
                yield ShardFiles(tuple(files.write([(f"{i}.{worker}", torch.full((9,), i))]) for worker in (0, 1)))

    readers = {i: Reader() for i, leader in enumerate([0, 0, 1]) if leader == rank}
    outcomes = fed_from(fan_out.stream(shards()), readers)
    dist.barrier()
    assert not any(outcome.error for outcome in outcomes.values())
    return [len(reader.tensors) for reader in readers.values()]


@pytest.mark.parametrize("nodes", [[0, 0], [0, 1]], ids=["one node", "two nodes"])
def test_shard_files_reach_every_engine_whole(nodes: list[int]) -> None:
    assert run_ranks(2, _feed_shards, nodes) == [[2 * BUCKETS] * 2, [2 * BUCKETS]]
