"""A teacher on the student's own ranks, in the same tensor- and pipeline-parallel layout."""

from __future__ import annotations

import torch

from opd_megatron.mcore.forward import response_hidden
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import Model
from opd_megatron.system.host_memory import HostMemory
from opd_megatron.types import Batch, TeacherInputs


class ColocatedTeacher:
    """Frozen Megatron model. Its vocabulary is padded like the student's, so its head already lies where the
    student's does and needs no copy."""

    beside = False
    changes = False

    def __init__(self, model: Model, grid: ParallelGrid, weight: float, *, offload: bool = False) -> None:
        self._model, self._grid, self._weight = model, grid, weight
        self._offload, self._host = offload, HostMemory()
        self._hidden: list[torch.Tensor] = []

    def submit(self, micro_batches: list[Batch]) -> None:
        """Runs the forward passes: there is nobody else to wait for."""
        self._hidden = response_hidden(self._model, self._grid, micro_batches) if micro_batches else []

    def collect(self) -> TeacherInputs:
        """Hands over hidden states and head of every micro batch; keeps neither."""
        hidden, self._hidden = self._hidden, []
        if not self._grid.is_last_stage:
            return TeacherInputs((), self._weight)
        head = self._model.head_weight.detach()
        return TeacherInputs([(states, head) for states in hidden], self._weight)

    def after_step(self) -> None:
        """Does nothing: it does not change."""

    def move_out(self) -> None:
        """Moves its weights to the host's memory if `offload` says so."""
        if self._offload:
            self._host.move_out(self._model.parameters())

    def move_back(self) -> None:
        """Takes its weights back."""
        self._host.move_back()

    def close(self) -> None:
        """Does nothing: memory is all that it holds."""
