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

from opd_megatron.errors import OPDError, RolloutError
from opd_megatron.rollout.side_by_side import fed_from, gathered
from opd_megatron.types import Bucket
from opd_megatron.weight_sync.bucket_buffers import Mappings
from opd_megatron.weight_sync.bucket_store import BucketStore, bucket_store
from opd_megatron.weight_sync.fan_out import FanOut
from opd_megatron.weight_sync.format import ShardFiles, SharedFiles, WeightFormat, WeightPayload
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


STORES = pytest.mark.parametrize("maps", [False, True], ids=["files", "memory"])


def _store(maps: bool) -> BucketStore:
    return bucket_store(WeightFormat(torch.float32, maps_memory=maps), torch.device("cpu"))


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
    """An engine that keeps what it is given, or ends after some buckets. One that `lags` reads a bucket when it has
    the next one, as vLLM does, which loads beside that."""

    def __init__(self, ends_after: int | None = None, *, lags: bool = False) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.folders: set[Path] = set()
        self.most = 0
        self._ends_after, self._lags = ends_after, lags
        self._mappings = Mappings()

    def __call__(self, payloads: Any) -> None:
        behind: list[Path] = []
        for i, payload in enumerate(payloads):
            assert isinstance(payload, SharedFiles)
            own = list(payload.own().paths)
            self.folders |= {path.parent for path in own}
            self.most = max(self.most, len({inode for folder in self.folders for inode in _inodes(folder)}))
            self._read(behind if self._lags else own)
            behind = own
            if i == self._ends_after:
                raise RolloutError("this engine has had enough")
        self._read(behind if self._lags else [])

    def _read(self, paths: list[Path]) -> None:
        for path in paths:
            self.tensors |= self._mappings.load(path, torch.device("cpu"))
            path.unlink()


def _inodes(folder: Path) -> Iterator[int]:
    for path in folder.glob("[0-9]*.*"):
        with contextlib.suppress(FileNotFoundError):  # another engine has read it
            yield path.stat().st_ino


def _feed(rank: int, world_size: int, leaders: list[int], nodes: list[int], quits: int | None, maps: bool) -> Any:
    fan_out = FanOut(leaders, nodes, _store(maps))
    expected = dict(pair for i in range(BUCKETS) for pair in _bucket(i))
    for lags in (False, True):  # a second sync begins afresh
        readers = {i: Reader(lags=lags) for i, leader in enumerate(leaders) if leader == rank}
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
            assert reader.most <= 2 + lags, "a node holds the bucket that is read and the next one"
            if quits is None:
                left = [str(path) for folder in reader.folders for path in folder.glob("[0-9]*.*")]
                assert not left, left
        dist.barrier()
    return fan_out.nbytes, threading.active_count()


@STORES
@pytest.mark.parametrize(("leaders", "nodes"), FLEETS, ids=str)
def test_every_engine_gets_every_tensor_and_each_node_every_byte_once(
    leaders: list[int], nodes: list[int], maps: bool
) -> None:
    sent = run_ranks(len(nodes), _feed, leaders, nodes, None, maps)
    weights = 2 * BUCKETS * sum(4 * math.prod(shape) for shape in SHAPES)
    heads = {nodes[rank]: rank for rank in sorted({0, *leaders}, reverse=True)}
    for rank, (nbytes, _) in enumerate(sent):
        if rank in heads.values():
            assert weights < nbytes < 1.3 * weights  # with the files' headers
        else:
            assert nbytes == 0


@STORES
@pytest.mark.parametrize(("leaders", "nodes"), FLEETS, ids=str)
def test_an_engine_that_ends_keeps_nobody_from_the_rest(leaders: list[int], nodes: list[int], maps: bool) -> None:
    run_ranks(len(nodes), _feed, leaders, nodes, len(leaders) - 1, maps)


@pytest.mark.parametrize(("leaders", "nodes"), [([0, 1, 1], [0, 0]), ([1], [0, 0]), ([0, 1], [0, 1])], ids=str)
def test_an_error_at_the_source_is_one_error_on_every_rank(leaders: list[int], nodes: list[int]) -> None:
    one, other = run_ranks(2, _fail, leaders, nodes)
    assert one == other
    assert "No space left on device" in one


def _fail(rank: int, world_size: int, leaders: list[int], nodes: list[int]) -> str:
    fan_out = FanOut(leaders, nodes, _store(False))
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


def _feed_shards(rank: int, world_size: int, nodes: list[int], maps: bool) -> list[int]:
    """Buckets of two workers, as shards have them."""
    fan_out = FanOut([0, 0, 1], nodes, _store(maps))
    stores = [_store(maps), _store(maps)]

    def shards() -> Iterator[WeightPayload]:
        for i in range(BUCKETS):
            dist.all_reduce(torch.zeros(1))
            if rank == 0:
                buckets = [[(f"{i}.{worker}", torch.full((9,), i))] for worker in (0, 1)]
                yield ShardFiles(tuple(store.write(b) for store, b in zip(stores, buckets, strict=True)))

    readers = {i: Reader() for i, leader in enumerate([0, 0, 1]) if leader == rank}
    outcomes = fed_from(fan_out.stream(shards()), readers)
    dist.barrier()
    assert not any(outcome.error for outcome in outcomes.values())
    return [len(reader.tensors) for reader in readers.values()]


@STORES
@pytest.mark.parametrize("nodes", [[0, 0], [0, 1]], ids=["one node", "two nodes"])
def test_shards_reach_every_engine_whole(nodes: list[int], maps: bool) -> None:
    assert run_ranks(2, _feed_shards, nodes, maps) == [[2 * BUCKETS] * 2, [2 * BUCKETS]]
