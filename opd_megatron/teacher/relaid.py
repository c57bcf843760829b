"""A teacher on the student's own ranks in a layout of its own: a student with two key-value heads does not bound it."""

from __future__ import annotations

import torch

from opd_megatron.data.batching import StepBatches
from opd_megatron.mcore.cpu.platform import device
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.teacher.links import TeacherLink
from opd_megatron.teacher.route import Job
from opd_megatron.teacher.source import StatesSource, rows_of, work_of
from opd_megatron.teacher.wire import Expected, Inbox, Outbox
from opd_megatron.types import Batch, TeacherInputs


class RelaidTeacher:
    """Runs the whole step, then takes what the student's rank of its place wants: the two do not run side by side."""

    beside = False
    changes = False

    def __init__(
        self, source: StatesSource, link: TeacherLink, head: torch.Tensor | None, student: ParallelGrid, weight: float,
        *, width: int, dtype: torch.dtype, offload: bool, name: str,
    ) -> None:  # fmt: skip
        self._source, self._link, self._head, self._student, self._weight = source, link, head, student, weight
        self._width, self._dtype, self._offload, self._name = width, dtype, offload, name
        self._states: list[torch.Tensor] = []

    def submit(self, micro_batches: list[Batch]) -> None:
        """Runs the forward passes and brings every micro batch's states to where the student wants them."""
        assert isinstance(micro_batches, StepBatches)
        route, student, rank = self._link.route, self._student, torch.distributed.get_rank()
        work, mine = work_of(route, micro_batches), micro_batches[: len(micro_batches.numbers(student.dp_rank))]
        at_home: dict[int, torch.Tensor] = {}
        outbox = Outbox(self._link.states, limit=None)

        def deliver(job: Job, place: tuple[int, int], rows: torch.Tensor) -> None:
            to = route.student.last_stage(job.data, *place)
            if to == rank:
                at_home[job.index] = rows
            else:
                outbox.send(rows, self._link.member(to), job.index)

        self._source.score(micro_batches, deliver)
        self._states = []
        if student.is_last_stage:
            ranks = student.tp_size if student.sequence_parallel else 1
            arriving = [
                Expected(index, rows_of(batch, ranks), self._link.member(sender))
                for index, batch in enumerate(mine)
                if (sender := work.sender(student.dp_rank, index, student.tp_rank)) != rank
            ]
            inbox = Inbox(
                self._link.states, arriving, self._width, self._dtype, ahead=len(arriving), device=device(),
                name=self._name,
            )  # fmt: skip
            found = at_home | {each.tag: inbox[i] for i, each in enumerate(arriving)}
            self._states = [found[index] for index in range(len(mine))]
        outbox.flush()

    def collect(self) -> TeacherInputs:
        """Hands over hidden states and head of every micro batch; keeps no states."""
        states, self._states = self._states, []
        if self._head is None:
            return TeacherInputs((), self._weight)
        return TeacherInputs([(each, self._head) for each in states], self._weight)

    def after_step(self) -> None:
        """Does nothing: it does not change."""

    def move_out(self) -> None:
        """Moves its weights to the host's memory if `offload` says so; the head stays."""
        if self._offload:
            self._source.host.move_out(self._source.model.parameters())

    def move_back(self) -> None:
        """Takes its weights back."""
        self._source.host.move_back()

    def close(self) -> None:
        """Does nothing: memory is all that it holds."""
