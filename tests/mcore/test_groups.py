"""The groups of a grid: as few as there are partitions of the ranks, the same on every rank, on the right backend, and
as patient as the group of all ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.meta_shards import fake_process_group
from opd_megatron.system import groups
from tests.ranks import run_ranks

Layout = tuple[int, int, int, int]  # tensor, pipeline, data, expert


def made_by(layout: Layout, rank: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], str | None]]:
    """Every group that a rank makes on a machine with GPUs, in order: its ranks and backend."""
    made: list[tuple[tuple[int, ...], str | None]] = []
    real = dist.new_group

    def new_group(ranks: list[int], backend: str | None = None, **options: Any) -> Any:
        made.append((tuple(ranks), backend))
        return real(ranks, **options)

    tp, pp, dp, ep = layout
    with fake_process_group(rank, tp * pp * dp), monkeypatch.context() as patch:
        patch.setattr(dist, "new_group", new_group)
        patch.setattr(dist, "get_backend_config", lambda group=None: "cpu:gloo,cuda:nccl")
        grid = ParallelGrid.build(tp, pp, dp, ep_size=ep)
        assert grid.world.size() == tp * pp * dp
    return made


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        ((1, 1, 1, 1), 1),
        ((1, 1, 8, 1), 8 + 1),  # one of each rank alone, one of all
        ((8, 1, 1, 1), 8 + 1),
        ((2, 2, 2, 1), 8 + 4 + 4 + 4 + 2 + 2 + 1),
        ((4, 2, 8, 1), 64 + 16 + 32 + 8 + 8 + 2 + 1),
        ((1, 1, 4, 2), 4 + 1 + 2 + 2),
        ((1, 1, 4, 4), 4 + 1 + 1),  # experts have a group of all ranks of their own
    ],
)
def test_each_partition_of_the_ranks_is_one_group_on_nccl_alone(layout: Layout, count: int, monkeypatch) -> None:
    made = made_by(layout, 0, monkeypatch)
    assert len(made) == count
    assert {backend for _, backend in made} == {"nccl"}


@pytest.mark.parametrize("layout", [(2, 2, 2, 1), (1, 2, 4, 2), (2, 1, 4, 4)])
def test_every_rank_makes_the_same_groups_in_the_same_order(layout: Layout, monkeypatch) -> None:
    of_rank_0 = made_by(layout, 0, monkeypatch)
    for rank in range(1, layout[0] * layout[1] * layout[2]):
        assert made_by(layout, rank, monkeypatch) == of_rank_0


def _memberships(rank: int, world_size: int) -> dict[str, list[int]]:
    grid = ParallelGrid.build(1, 2, 2, ep_size=2)
    found = grid.groups
    names = ("tp", "cp", "pp", "dp", "dp_cp", "mp", "tp_cp", "tp_dp_cp", "embd", "ep", "expt_dp", "tp_ep", "tp_ep_pp")
    return {name: dist.get_process_group_ranks(getattr(found, name)) for name in names}


def test_groups_hold_the_ranks_that_megatron_means() -> None:
    for rank, found in enumerate(run_ranks(4, _memberships)):
        stage, replica = divmod(rank, 2)
        of_stage, of_replica = [2 * stage, 2 * stage + 1], [replica, replica + 2]
        assert found == {
            "tp": [rank], "cp": [rank], "tp_cp": [rank], "expt_dp": [rank], "dp": of_stage, "dp_cp": of_stage,
            "tp_dp_cp": of_stage, "ep": of_stage, "tp_ep": of_stage, "pp": of_replica, "mp": of_replica,
            "embd": of_replica, "tp_ep_pp": [0, 1, 2, 3],
        }  # fmt: skip


def _patience_of_groups(rank: int, world_size: int) -> set[timedelta]:
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77)
    )  # fmt: skip
    grid = ParallelGrid.build(1, 1, 1)
    made = [grid.world, grid.groups.tp, groups.cpu_group(), groups.cpu_group([0]), groups.model_group([0])]
    return {group._get_backend(torch.device("cpu")).options._timeout for group in made}


def test_every_group_waits_as_long_as_the_group_of_all_ranks() -> None:
    assert run_ranks(1, _patience_of_groups) == [{timedelta(seconds=77)}]


def test_a_pretended_group_has_the_usual_patience() -> None:
    with fake_process_group(0, 2):
        assert groups.collective_timeout() == timedelta(seconds=groups.DEFAULT_TIMEOUT)
