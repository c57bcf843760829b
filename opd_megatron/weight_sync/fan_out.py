"""From the rank where the weights come out to every engine of a fleet: each node once, there shared by its engines.

    rank 0            bucket -> memory of its node: a file, or a buffer that others map (`bucket_store`)
    other nodes       its bytes, broadcast to the first rank there that needs them, which puts them down again
    every engine      what lies on its node, under a name of its own

The ranks with engines learn of each bucket from rank 0. Meanwhile they are in the collectives that gather it, which is
why those run in a thread there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from opd_megatron.errors import OPDError, RolloutError, one_line
from opd_megatron.system.groups import cpu_group, model_group
from opd_megatron.weight_sync.bucket_store import BucketStore
from opd_megatron.weight_sync.format import ShardFiles, SharedFiles, WeightPayload, tensors_of

_SOURCE = 0
"""Global rank where payloads come out of a stream."""


@dataclass(frozen=True, slots=True)
class _Announcement:
    """What rank 0 tells of the next bucket; without paths it is the end."""

    paths: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    error: tuple[type[OPDError], str] | None = None


class FanOut:
    """One rank's end of it. Every method is a collective."""

    def __init__(
        self, leaders: Sequence[int], nodes: Sequence[int], store: BucketStore, device: torch.device | None = None
    ) -> None:
        """
        Args:
            leaders: the rank of each engine.
            nodes: the node of each rank.
            store: where buckets lie on this rank's node.
            device: where bytes for other nodes travel from and to: this rank's GPU where the backend wants that.
        """
        self._members = sorted({_SOURCE, *leaders})
        self._nodes, self._rank = nodes, dist.get_rank() if dist.is_initialized() else _SOURCE
        self._store = store
        self._device = device or torch.device("cpu")
        heads = {nodes[rank]: rank for rank in reversed(self._members)}
        self._is_head = self._rank in heads.values()
        self._group = _several(self._members, cpu_group)
        self._heads = _several(sorted(heads.values()), model_group)
        self._many_nodes = len(heads) > 1
        self.nbytes = 0
        """Of all that this rank has sent or received so far, each node counted once."""

    def stream(self, payloads: Iterator[WeightPayload]) -> Iterator[WeightPayload]:
        """Yields every payload on the ranks that have engines; exhaust it on all of them."""
        self.close()  # what engines that died did not read
        if self._rank == _SOURCE:
            return self._send(payloads)
        if self._rank in self._members:
            return self._receive(payloads)
        return payloads

    def close(self) -> None:
        """Frees what lies on this rank's node, which all engines must have read. Not a collective."""
        self._store.close()

    def _send(self, payloads: Iterator[WeightPayload]) -> Iterator[SharedFiles]:
        shared: tuple[Path, ...] = ()
        try:
            for payload in payloads:
                paths = self._written(payload)
                sizes = tuple(self._store.size(path) for path in paths)
                self._announce(_Announcement(tuple(map(str, paths)), sizes))
                _remove(shared)  # all engines have asked for this one, so they have what was before
                shared = paths
                self.nbytes += sum(sizes)
                yield SharedFiles(paths)
        except GeneratorExit:
            raise
        except BaseException as error:
            kind = type(error) if isinstance(error, OPDError) else RolloutError
            self._announce(_Announcement(error=(kind, f"the weights could not be sent: {one_line(error)}")))
            raise
        self._announce(_Announcement())
        _remove(shared)

    def _written(self, payload: WeightPayload) -> tuple[Path, ...]:
        if isinstance(payload, ShardFiles | SharedFiles):
            return payload.paths
        return (self._store.write(tensors_of(payload)),)

    def _announce(self, announcement: _Announcement) -> None:
        """Tells the other ranks with engines, once they have handed on the bucket before; sends other nodes theirs."""
        self._exchanged(announcement)
        if self._many_nodes and announcement.paths:
            for path in announcement.paths:
                self._broadcast(self._store.read(Path(path)))
            self._exchanged(announcement)

    def _receive(self, payloads: Iterator[WeightPayload]) -> Iterator[SharedFiles]:
        pump = _InThread(lambda: [None for _ in payloads], self._device)
        shared: tuple[Path, ...] = ()
        while True:
            announced = self._exchanged(None)[_SOURCE]
            assert announced is not None
            _remove(shared)
            if announced.error is not None:
                pump.join()
                raise announced.error[0](announced.error[1])
            if not announced.paths:
                break
            paths = tuple(map(Path, announced.paths))
            if self._many_nodes:
                paths, shared = self._from_the_first_of_this_node(announced, paths)
            self.nbytes += sum(announced.sizes) if self._is_head else 0
            yield SharedFiles(paths)
        pump.join()

    def _from_the_first_of_this_node(
        self, announced: _Announcement, paths: tuple[Path, ...]
    ) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        """The files of this node, and those of them that are this rank's to remove."""
        written: tuple[Path, ...] = ()
        if self._is_head:
            arrived = (self._broadcast(torch.empty(size, dtype=torch.uint8)) for size in announced.sizes)
            written = tuple(self._store.store(values) for values in arrived)
        mine = _Announcement(tuple(map(str, written)))
        told = self._exchanged(mine)
        node = self._nodes[self._rank]
        if node == self._nodes[_SOURCE]:
            return paths, ()
        head = next(rank for rank in self._members if self._nodes[rank] == node)
        announced_here = told[head]
        assert announced_here is not None
        return tuple(map(Path, announced_here.paths)), written

    def _broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """From rank 0 to the first rank of every node."""
        there = values.to(self._device)
        dist.broadcast(there, src=_SOURCE, group=self._heads)
        return there

    def _exchanged(self, mine: _Announcement | None) -> dict[int, _Announcement | None]:
        """What every member says, by rank; all of them are there when it returns."""
        if self._group is None:
            return {}
        told: list[_Announcement | None] = [None] * len(self._members)
        dist.all_gather_object(told, mine, group=self._group)
        return dict(zip(self._members, told, strict=True))


class _InThread:
    """Something that runs beside the caller and whose error is the caller's in the end."""

    def __init__(self, action: Callable[[], Any], device: torch.device) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(action, device), daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[], Any], device: torch.device) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a thread begins with the first one
            action()
        except BaseException as error:
            self._error = error

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def _several(ranks: Sequence[int], make: Callable[[Sequence[int]], ProcessGroup]) -> ProcessGroup | None:
    """None where there is nobody to talk to. Collective over all ranks."""
    return make(ranks) if len(ranks) > 1 else None


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
