"""Builds any rank's modules on meta tensors under a fake process group."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from opd_megatron.config import ParallelConfig
from opd_megatron.mcore.cpu.platform import init_platform
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import build_gpt_model
from opd_megatron.weights.families import family_of
from opd_megatron.weights.layout import ShardLayout


def distinct_shards(
    hf_config: PretrainedConfig, parallel: ParallelConfig, data: int, padded_vocab: int
) -> Iterator[tuple[torch.nn.Module, ShardLayout]]:
    """Builds the module of every pipeline stage, tensor- and (MoE) expert-parallel rank, with its layout.

    Data-parallel copies are the same and are left out. Parameters are meta tensors: names and shapes, no memory. The
    process must not be in a process group.
    """
    init_platform()
    experts = parallel.expert if family_of(hf_config).experts else 1
    # From slowest to fastest as in `ParallelGrid`; the first context- and data-parallel ranks divide the experts.
    numbers = range(experts * parallel.tensor)
    if parallel.whole_experts and experts > 1:  # or the first ranks of all kinds
        numbers = range(max(experts, parallel.tensor))
    for stage, number in itertools.product(range(parallel.pipeline), numbers):
        tensor = number % parallel.tensor
        expert = number % experts if parallel.whole_experts else number // parallel.tensor
        rank = stage * data * parallel.context * parallel.tensor + number
        with fake_process_group(rank, parallel.model * data), _MetaParameters():
            grid = ParallelGrid.build(
                parallel.tensor, parallel.pipeline, data,
                ep_size=parallel.expert, cp_size=parallel.context, sequence_parallel=parallel.sequence_parallel,
                whole_experts=parallel.whole_experts,
            )  # fmt: skip
            layout = grid.layout(
                hf_config.num_hidden_layers, padded_vocab, virtual=parallel.virtual_stages, stages=parallel.stages
            )
            model = build_gpt_model(hf_config, grid, padded_vocab=padded_vocab, dtype="bf16", parts=layout.parts)
        assert (layout.pp_rank, layout.tp_rank) == (stage, tensor)
        assert layout.ep_rank == expert or experts == 1
        yield model, layout


@contextmanager
def fake_process_group(rank: int, world: int) -> Iterator[None]:
    """Makes a default process group of `world` ranks in which this process is `rank` and collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a planner must not run inside a training process"
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _MetaParameters(TorchFunctionMode):
    """Makes parameters on the meta device; moves to a GPU do nothing."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("empty", "ones"):
            kwargs = {**kwargs, "device": "meta"}
        elif name == "cuda" and args[0].is_meta:
            return args[0]
        return function(*args, **kwargs)
