"""A teacher's own side: one rank of its grid runs its replica's micro batches and hands the states on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from opd_megatron.config import MegatronTeacherConfig, RunConfig, decided
from opd_megatron.data.batching import StepBatches
from opd_megatron.data.context import context_columns, local_rows
from opd_megatron.mcore.cpu.platform import device
from opd_megatron.mcore.forward import run_schedule
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import Model, build_gpt_model, sequence_shards
from opd_megatron.mcore.te import use_transformer_engine
from opd_megatron.models import ResolvedModels
from opd_megatron.system.host_memory import HostMemory
from opd_megatron.teacher.route import Job, Route, Work
from opd_megatron.types import Batch
from opd_megatron.weights.load import load_weights
from opd_megatron.weights.quantized import forget_origin

Deliver = Callable[[Job, tuple[int, int], torch.Tensor], None]
"""(micro batch, the student's tensor- and context-parallel rank, its rows of the states)."""


def load_teacher(
    teacher: MegatronTeacherConfig,
    source: tuple[Path, PretrainedConfig],
    models: ResolvedModels,
    grid: ParallelGrid,
    config: RunConfig,
    *,
    like_student: bool = False,
) -> Model:
    """Builds this rank's shard of a frozen teacher; `like_student`: with the same layers on it. Raises WeightsError."""
    folder, hf_config = source
    padded_vocab, parallel = models.padded_vocab(grid.tp_size, hf_config), config.parallel
    stages: dict[str, Any] = {}
    if like_student:
        stages = {"virtual": parallel.virtual_stages, "stages": parallel.stages}
    layout = grid.layout(hf_config.num_hidden_layers, padded_vocab, **stages)
    model = build_gpt_model(
        hf_config,
        grid,
        padded_vocab=padded_vocab,
        dtype=decided(teacher.dtype),
        transformer_engine=use_transformer_engine(config.student.transformer_engine),
        precision=getattr(teacher, "precision", None),
        parts=layout.parts,
    )
    load_weights(model, folder, hf_config, layout)
    for parameter in model.parameters():
        forget_origin(parameter)
    model.requires_grad_(False)
    model.eval()
    return model


class StatesSource:
    """One rank of a teacher's grid."""

    def __init__(self, model: Model, grid: ParallelGrid, route: Route, *, sharded: bool, multiple_of: int = 1) -> None:
        """`sharded`: the student's ranks want their sequence-parallel rows alone. `multiple_of`: what the model's micro
        batches are padded to (`PrecisionConfig.alignment`)."""
        self.model, self._grid, self._route, self._sharded = model, grid, route, sharded
        self._multiple_of = multiple_of
        self.host = HostMemory()

    @torch.no_grad()
    def score(self, step: StepBatches, deliver: Deliver) -> None:
        """Runs the replica's micro batches in its order; on its last stage `deliver` gets each one's rows for each of
        the student's ranks that this one sends to."""
        jobs = work_of(self._route, step).jobs(self._grid.dp_rank)
        student = self._route.student
        theirs = {job.data: step.of(job.data, device=torch.device("cpu"), **WHOLE) for job in jobs}
        batches = {job.data: self._padded(step, job.data) for job in jobs}

        def hand_on(index: int, rows: torch.Tensor, _: Batch) -> tuple[torch.Tensor, torch.Tensor, None]:
            job = jobs[index]
            if job.wanted:
                batch = theirs[job.data][job.index]
                for context in range(student.context):
                    parts = student_rows(
                        rows, batch, student.tensor, context, student.context, sharded=self._sharded
                    )  # fmt: skip
                    for tensor in self._route.receivers(self._grid.tp_rank):
                        deliver(job, (tensor, context), parts[tensor])
            return rows.sum(), torch.zeros((), dtype=torch.int, device=rows.device), None

        run_schedule(self.model, self._grid, [batches[job.data][job.index] for job in jobs], hand_on, forward_only=True)

    def _padded(self, step: StepBatches, data: int) -> list[Batch]:
        """A student replica's micro batches as this teacher wants them: its stages exchange tensors of one shape."""
        return step.of(data, one_length=self._grid.pp_size > 1, multiple_of=self._multiple_of, device=device(), **WHOLE)


WHOLE: dict[str, Any] = {"context_rank": 0, "context_size": 1}
"""Of a builder that cuts no sequences; they are padded as the student's are."""


def student_rows(
    rows: torch.Tensor, batch: Batch, tensor: int, context: int, contexts: int, *, sharded: bool
) -> list[torch.Tensor]:
    """What each tensor-parallel rank of one of the student's context-parallel ranks takes of a whole micro batch's
    states [T, h]; `sharded`: its sequence-parallel rows alone."""
    mask = batch.response_mask
    if contexts > 1:
        assert batch.lengths is not None
        rows = rows.index_select(0, local_rows(mask, batch.lengths, context, contexts).to(rows.device))
        mask = mask[:, context_columns(batch.lengths, context, contexts)]
    return sequence_shards(rows, mask, tensor) if sharded else [rows] * tensor


def work_of(route: Route, step: StepBatches) -> Work:
    """Deals a step to a teacher's replicas."""
    return Work(route, [step.numbers(data) for data in range(route.student.data)])


def rows_of(batch: Batch, ranks: int) -> int:
    """Rows of states that one of the student's `ranks` sequence-parallel ranks takes; all of them for 1."""
    mask = batch.response_mask
    if ranks == 1:
        return int(mask.sum())
    size, length = mask.shape
    return int(mask.view(size, ranks, length // ranks).sum((0, 2)).max())
