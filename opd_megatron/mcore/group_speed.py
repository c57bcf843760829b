"""How fast each kind of process group is: a small all-reduce, all-to-all and broadcast over every one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.mcore.cpu.platform import device
from opd_megatron.mcore.grid import ParallelGrid


@dataclass(frozen=True, slots=True)
class GroupSpeed:
    """One kind of group; of all groups of a kind the slowest counts."""

    name: str
    ranks: int
    backend: str
    all_reduce: float
    """GB/s over the wire of each rank, 2 (n - 1) / n of the bytes, as NCCL's own tests count it; so are the others."""
    all_to_all: float
    broadcast: float


def measure_groups(grid: ParallelGrid, *, megabytes: int, repeats: int = 3) -> list[GroupSpeed]:
    """Measures every kind of group that has more than one rank. Collective over all ranks of the grid.

    Raises AssertionError when a group adds up wrongly.
    """
    mine = {name: _measure(name, group, on, megabytes, repeats) for name, group, on in _kinds(grid)}
    everyone: list[dict[str, GroupSpeed]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    names = dict.fromkeys(name for each in everyone for name in each)
    of_each = ([each[name] for each in everyone if name in each] for name in names)
    return [min(speeds, key=lambda speed: speed.all_reduce) for speeds in of_each]


def _kinds(grid: ParallelGrid) -> Iterator[tuple[str, dist.ProcessGroup, torch.device]]:
    groups = grid.groups
    kinds = {
        "tensor": groups.tp, "pipeline": groups.pp, "data": groups.dp_cp, "expert": groups.ep,
        "tied embeddings": groups.embd, "student": grid.world,
    }  # fmt: skip
    for name, group in kinds.items():
        if group is not None and group.size() > 1:
            yield name, group, device()
    if dist.get_world_size() > 1:
        yield "objects, on the CPU", dist.distributed_c10d._get_default_group(), torch.device("cpu")


def _measure(name: str, group: dist.ProcessGroup, on: torch.device, megabytes: int, repeats: int) -> GroupSpeed:
    ranks = group.size()
    count = megabytes * 250_000 // ranks * ranks
    ones, other = torch.ones(count, device=on), torch.empty(count, device=on)
    dist.all_reduce(ones, group=group)
    assert bool((ones == ranks).all()), f"the sum of ones over the {ranks} ranks of group {name!r} is not {ranks}"
    share = (ranks - 1) / ranks
    speeds = [
        part * ones.nbytes / _seconds(action, group, repeats) / 1e9
        for part, action in (
            (2 * share, lambda: dist.all_reduce(other, group=group)),
            (share, lambda: dist.all_to_all_single(other, ones, group=group)),
            (1.0, lambda: dist.broadcast(other, group_src=0, group=group)),
        )
    ]
    return GroupSpeed(name, ranks, _backend_of(group, on), *speeds)


def _seconds(action: Callable[[], object], group: dist.ProcessGroup, repeats: int) -> float:
    """The fastest of some runs, the first not among them."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier(group)
        _wait()
        began = time.perf_counter()
        action()
        _wait()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _backend_of(group: dist.ProcessGroup, on: torch.device) -> str:
    return str(group._get_backend(on).name())
