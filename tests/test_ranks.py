"""The pool of ranks that the distributed tests share."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import nn

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
