"""The student as its own teacher (`path: student`): as it is now, or as an average of what it was.

It teaches something where it reads more than the student does (`teachers.N.prompt`), or where it is steadier (`ema`).
"""

from __future__ import annotations

from opd_megatron.mcore.average import WeightAverage
from opd_megatron.mcore.forward import response_hidden
from opd_megatron.mcore.student import Student
from opd_megatron.teacher.colocated import ColocatedTeacher
from opd_megatron.types import Batch

DEFAULT_DECAY = 0.999


class LiveTeacher(ColocatedTeacher):
    """The student's own model, before its next update. Needs no memory for weights."""

    changes = True

    def __init__(self, student: Student, weight: float) -> None:
        super().__init__(student.model, student.grid, weight)

    def submit(self, micro_batches: list[Batch]) -> None:
        """Runs the forward passes without dropout or gradients; the student's hooks for gradients see none of it."""
        self._model.eval()
        self._hidden = response_hidden(self._model, self._grid, micro_batches) if micro_batches else []

    def move_out(self) -> None:
        """Does nothing: what leaves the GPU is the student's to say."""


class AverageTeacher(ColocatedTeacher):
    """A moving average of the student's weights, part of its checkpoints."""

    changes = True

    def __init__(self, average: WeightAverage, student: Student, weight: float, *, offload: bool) -> None:
        super().__init__(average.model, student.grid, weight, offload=offload)
        self._average = average

    def after_step(self) -> None:
        """Follows the student."""
        self._average.follow()

    def move_out(self) -> None:
        """Moves its weights and their average to the host's memory if `offload` says so."""
        if self._offload:
            self._host.move_out([*self._model.parameters(), *self._average.values.values()])
