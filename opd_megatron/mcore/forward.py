"""Running a model through Megatron's pipeline schedules, one micro batch after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from opd_megatron.mcore.cpu.attention import packing_of
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import HiddenStatesModel, Model
from opd_megatron.mcore.stages import ModelChunks
from opd_megatron.types import Batch

LossFunction = Callable[[int, torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor, Any]]
"""(micro batch index, response rows, micro batch) -> Megatron's (loss_sum, num_tokens, anything).

The rows are hidden states [T, h] at the response positions, in the order of `weights.nonzero()`. Under sequence
parallelism they are this rank's [R, h] of them, see `HiddenStatesModel.response_rows`."""


def run_schedule(
    model: torch.nn.Module | list[torch.nn.Module],
    grid: ParallelGrid,
    micro_batches: list[Batch],
    loss_function: LossFunction,
    *,
    forward_only: bool = False,
) -> list[Any]:
    """Runs forward (and backward) of all micro batches; returns what `loss_function` gave as its third item.

    `model` is a rank's shard (`stages.Model`), or the DDP wrappers of its chunks. The list is empty on all but the last
    pipeline stage. All micro batches of all ranks of a pipeline must share one shape, unless they are packed; with
    virtual stages they must be packed, and as many as a multiple of the stages.
    """
    chunks = list(model) if isinstance(model, list | ModelChunks) else [model]
    core: HiddenStatesModel = get_attr_wrapped_model(chunks[-1], "decoder", return_model_obj=True)
    config = get_model_config(chunks[0])

    def forward_step(batches: Iterator[tuple[int, Batch]], chunk: torch.nn.Module, *_: Any) -> tuple[Any, Any]:
        index, batch = next(batches)
        hidden = chunk(
            input_ids=batch.tokens, position_ids=batch.position_ids, attention_mask=None, **_packing(core, grid, batch)
        )

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
            return loss_function(index, core.response_rows(output, batch.response_mask), batch)

        return hidden, loss

    batch_size, length = micro_batches[0].tokens.shape
    config.variable_seq_lengths = micro_batches[0].lengths is not None  # stages say the shape before each tensor
    run = get_forward_backward_func(pp_size=grid.pp_size, vp_size=len(chunks) if len(chunks) > 1 else None)
    batches = [iter(list(enumerate(micro_batches))) for _ in chunks]
    return run(
        forward_step_func=forward_step,
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=chunks,
        num_microbatches=len(micro_batches),
        seq_length=length * grid.cp_size,
        micro_batch_size=batch_size,
        forward_only=forward_only,
        pg_collection=grid.groups,
        p2p_communicator=P2PCommunicator(pp_group=grid.groups.pp, config=config),
    )


def _packing(model: HiddenStatesModel, grid: ParallelGrid, batch: Batch) -> dict[str, Any]:
    """What attention and rotary positions must know of a packed batch; nothing of a padded one."""
    if batch.lengths is None:
        return {}
    on_host = model.positions_from_batch
    return {"packed_seq_params": packing_of(batch.lengths, batch.tokens.device, context=grid.cp_size, on_host=on_host)}


@torch.no_grad()
def response_hidden(model: Model, grid: ParallelGrid, micro_batches: list[Batch]) -> list[torch.Tensor]:
    """Runs the model forward and returns the response rows (`LossFunction`) of every micro batch; last stage only."""

    def keep(_: int, hidden: torch.Tensor, __: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return hidden.sum(), torch.zeros((), dtype=torch.int, device=hidden.device), hidden

    return run_schedule(model, grid, micro_batches, keep, forward_only=True)
