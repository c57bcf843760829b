"""A model's files read once, whoever holds copies of it.

    one rank of each shard's copies (data-parallel rank 0)   reads from storage
    the others                                               get its bytes from it

    tensor-parallel ranks, of a matrix that is cut by columns: its rows lie one after another in the file, so each reads
    some rows whole, and they hand each other the columns

A rank that fails to read still sends what it has, as the others wait for it; all of them learn of it at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from opd_megatron.errors import WeightsError
from opd_megatron.system.collectives import raise_on_all_ranks
from opd_megatron.weights.hf_reader import READ_BYTES, SafetensorsSource
from opd_megatron.weights.layout import ShardLayout


class SharedReading:
    """One rank's part in it. Every rank of the layout makes the same calls in the same order."""

    def __init__(self, layout: ShardLayout) -> None:
        self._layout = layout
        self._error: Exception | None = None
        self._sending: list[dist.Work] = []

    def reads(self, *, expert: bool) -> bool:
        """Whether this rank is the one that reads parameters of its shard; `expert`: those of its experts."""
        copies = self._copies(expert)
        return copies is None or copies.rank() == 0

    def attempt(self, action: Callable[[], object]) -> None:
        """Does something of this rank's own, unless it has failed before."""
        if self._error is None:
            try:
                action()
            except Exception as error:
                self._error = error

    def hand_on(self, tensor: torch.Tensor, *, expert: bool) -> None:
        """Sends a parameter from the rank that read it to those that hold the same; the next one is read meanwhile."""
        copies = self._copies(expert)
        if copies is not None:
            work = dist.broadcast(as_bytes(tensor), group_src=0, group=copies, async_op=True)
            assert work is not None
            self._sending.append(work)

    def settle(self) -> None:
        """Waits for what was sent."""
        for work in self._sending:
            work.wait()
        self._sending.clear()

    def read_columns(self, source: SafetensorsSource, name: str, target: torch.Tensor) -> None:
        """Fills `target` [r, c] with this tensor-parallel rank's columns of a matrix [r, c * ranks]. Collective over
        the tensor-parallel ranks that read."""
        group, ranks, rank = self._layout.tp_group, self._layout.tp_size, self._layout.tp_rank
        assert group is not None
        rows, columns = target.shape
        step = min(-(-rows // ranks), max(1, READ_BYTES // (columns * ranks * 4)))
        for first in range(0, rows, step * ranks):
            counts = [max(0, min(step, rows - first - step * each)) for each in range(ranks)]
            mine, begin = torch.zeros(ranks, counts[rank], columns, dtype=target.dtype), first + step * rank

            def read(mine: torch.Tensor = mine, begin: int = begin) -> None:
                whole = source.get_slice(name, (slice(begin, begin + mine.shape[1]),))
                mine.copy_(whole.unflatten(1, (ranks, -1)).transpose(0, 1))

            if counts[rank]:
                self.attempt(read)
            dist.all_to_all_single(
                as_bytes(target[first : first + sum(counts)]), as_bytes(mine.flatten(0, 1).to(target.device)),
                counts, [counts[rank]] * ranks, group=group,
            )  # fmt: skip

    def finish(self, what: str) -> None:
        """Waits for what was sent. Raises the error of whichever rank failed on all ranks of the layout."""
        self.settle()
        if self._layout.world is not None:
            raise_on_all_ranks(self._error, what, WeightsError, group=self._layout.world)
        elif self._error is not None:
            raise self._error

    def _copies(self, expert: bool) -> ProcessGroup | None:
        group = self._layout.expert_dp_group if expert else self._layout.dp_group
        return group if group is not None and group.size() > 1 else None


def read_once(fill: Callable[[], object], tensor: torch.Tensor, group: ProcessGroup, what: str) -> None:
    """Fills a tensor on the first rank of a group and gives the others a copy. Collective.

    Raises:
        WeightsError: on every rank, what the first one met.
    """
    error: Exception | None = None
    if group.rank() == 0:
        try:
            fill()
        except Exception as problem:
            error = problem
    if group.size() == 1:
        if error is not None:
            raise error
        return
    raise_on_all_ranks(error, what, WeightsError, group=group)
    dist.broadcast(as_bytes(tensor), group_src=0, group=group)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Not every backend knows every dtype."""
    return tensor.view(torch.uint8)
