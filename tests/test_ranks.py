"""The pool of ranks that the distributed tests share."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import ranks
from tests.ranks import run_ranks


class _Cycle(nn.Module):
    """Refers to itself and to its groups, as models and optimizers do."""

    def __init__(self, groups: list[dist.ProcessGroup]) -> None:
        super().__init__()
        self.groups, self.itself = groups, [self]


def _makes_groups(rank: int, world_size: int) -> int:
    cycle = _Cycle([dist.new_group() for _ in range(8)])
    assert cycle.groups
    return len(os.listdir("/proc/self/task"))


def _threads(rank: int, world_size: int) -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_body_leaves_no_threads_of_its_process_groups_behind() -> None:
    most = max(run_ranks(2, _makes_groups))
    for _ in range(3):
        run_ranks(2, _makes_groups)
    assert max(run_ranks(2, _threads)) < most


def _tensor_of_a_worker_that_is_renewed(rank: int, world_size: int) -> torch.Tensor:
    for _ in range(ranks._MANY_THREADS):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return torch.full((1000,), float(rank))


def test_results_of_workers_that_end_at_once_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    collect = ranks._collect

    def when_they_have_ended(workers: list[tuple[ranks.Any, ranks.Connection]], deadline: float) -> list[ranks.Any]:
        for process, _ in workers:
            process.join(60)
            assert process.exitcode == 0
        return collect(workers, deadline)

    monkeypatch.setattr(ranks, "_collect", when_they_have_ended)
    assert [tensor.mean().item() for tensor in run_ranks(2, _tensor_of_a_worker_that_is_renewed)] == [0.0, 1.0]
    monkeypatch.undo()
    assert run_ranks(2, _threads)  # by new workers
