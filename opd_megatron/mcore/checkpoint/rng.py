"""Random states of all ranks. They are valid for one layout: another one starts from new seeds."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from opd_megatron.mcore.cpu.platform import has_gpu
from opd_megatron.mcore.grid import ParallelGrid


def rng_state(grid: ParallelGrid) -> dict[str, Any]:
    """Gathers the generators' states of every rank, on all ranks. Collective."""
    mine = {"cpu": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
    if has_gpu():
        mine["gpu"] = torch.cuda.get_rng_state()
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, {name: state.cpu() for name, state in mine.items()})
    return {"layout": _layout(grid), "ranks": states}


def set_rng_state(saved: dict[str, Any], grid: ParallelGrid) -> bool:
    """Restores the saved generators where the layout is the saved one, and returns whether it is."""
    if saved["layout"] != _layout(grid):
        return False
    mine = dict(saved["ranks"][dist.get_rank()])
    if ("gpu" in mine) != has_gpu():
        return False
    torch.set_rng_state(mine.pop("cpu"))
    if has_gpu():
        torch.cuda.set_rng_state(mine.pop("gpu"))
    get_cuda_rng_tracker().set_states(mine)
    return True


def _layout(grid: ParallelGrid) -> list[int]:
    return [grid.pp_size, grid.tp_size, grid.dp_size, *([grid.cp_size] if grid.cp_size > 1 else [])]
