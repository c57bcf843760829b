"""A teacher's own side: one rank of its grid runs its replica's micro batches and hands the states on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PretrainedConfig

from opd_megatron.config import MegatronTeacherConfig, RunConfig, decided
from opd_megatron.data.batching import StepBatches
from opd_megatron.mcore.cpu.platform import device
from opd_megatron.mcore.forward import run_schedule
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import HiddenStatesModel, build_gpt_model, sequence_shards
from opd_megatron.mcore.spec import use_transformer_engine
from opd_megatron.models import ResolvedModels
from opd_megatron.system.host_memory import HostMemory
from opd_megatron.teacher.route import Job, Route, Work
from opd_megatron.types import Batch
from opd_megatron.weights.load import load_weights

Deliver = Callable[[Job, int, torch.Tensor], None]
"""(micro batch, the student's tensor-parallel rank, its rows of the states)."""


def load_teacher(
    teacher: MegatronTeacherConfig,
    source: tuple[Path, PretrainedConfig],
    models: ResolvedModels,
    grid: ParallelGrid,
    config: RunConfig,
) -> HiddenStatesModel:
    """Builds this rank's shard of a frozen teacher. Raises WeightsError."""
    folder, hf_config = source
    padded_vocab = models.padded_vocab(grid.tp_size, hf_config)
    model = build_gpt_model(
        hf_config,
        grid,
        padded_vocab=padded_vocab,
        dtype=decided(teacher.dtype),
        transformer_engine=use_transformer_engine(config.student.transformer_engine),
    )
    load_weights(model, folder, hf_config, grid.layout(hf_config.num_hidden_layers, padded_vocab))
    model.requires_grad_(False)
    model.eval()
    return model


class StatesSource:
    """One rank of a teacher's grid."""

    def __init__(self, model: HiddenStatesModel, grid: ParallelGrid, route: Route, *, sharded: bool) -> None:
        """`sharded`: the student's ranks want their sequence-parallel rows alone."""
        self.model, self._grid, self._route, self._sharded = model, grid, route, sharded
        self.host = HostMemory()

    @torch.no_grad()
    def score(self, step: StepBatches, deliver: Deliver) -> None:
        """Runs the replica's micro batches in its order; on its last stage `deliver` gets each one's rows for each of
        the student's ranks that this one sends to."""
        jobs = work_of(self._route, step).jobs(self._grid.dp_rank)
        theirs = {job.data: step.of(job.data, device=torch.device("cpu")) for job in jobs}
        batches = {job.data: self._padded(step, job.data) for job in jobs}

        def hand_on(index: int, rows: torch.Tensor, _: Batch) -> tuple[torch.Tensor, torch.Tensor, None]:
            job = jobs[index]
            if job.wanted:
                mask = theirs[job.data][job.index].weights.to(rows.device) > 0
                ranks = self._route.student.tensor
                parts = sequence_shards(rows, mask, ranks) if self._sharded else [rows] * ranks
                for tensor in self._route.receivers(self._grid.tp_rank):
                    deliver(job, tensor, parts[tensor])
            return rows.sum(), torch.zeros((), dtype=torch.int, device=rows.device), None

        run_schedule(self.model, self._grid, [batches[job.data][job.index] for job in jobs], hand_on, forward_only=True)

    def _padded(self, step: StepBatches, data: int) -> list[Batch]:
        """A student replica's micro batches as this teacher wants them: its stages exchange tensors of one shape."""
        return step.of(data, one_length=self._grid.pp_size > 1, multiple_of=1, device=device())


def work_of(route: Route, step: StepBatches) -> Work:
    """Deals a step to a teacher's replicas."""
    return Work(route, [step.numbers(data) for data in range(route.student.data)])


def rows_of(batch: Batch, ranks: int) -> int:
    """Rows of states that one of the student's `ranks` sequence-parallel ranks takes; all of them for 1."""
    mask = batch.weights > 0
    if ranks == 1:
        return int(mask.sum())
    size, length = mask.shape
    return int(mask.view(size, ranks, length // ranks).sum((0, 2)).max())
