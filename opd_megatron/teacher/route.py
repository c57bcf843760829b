"""Which replica of a teacher scores which micro batch of the student's replicas, and which rank sends it to which.

Both sides work this out from sizes and numbers alone, so that nothing has to be agreed on. Micro batches go round the
teacher's replicas in the order of their numbers (first of every student replica, second of every one, ..): the
student's replicas may wait for each other in every layer (experts) and for several teachers, so that no teacher may
hold up an earlier micro batch of one replica for a later one of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Grid:
    """A model's place in the job: tensor-parallel ranks are neighbours, pipeline stages far apart (`ParallelGrid`)."""

    first: int
    """Rank in the job."""
    tensor: int
    pipeline: int
    data: int
    context: int = 1

    @property
    def size(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.size)

    def last_stage(self, data: int, tensor: int, context: int = 0) -> int:
        """The rank that holds final hidden states of a replica, or of its part of every sequence."""
        replica = ((self.pipeline - 1) * self.data + data) * self.context + context
        return self.first + replica * self.tensor + tensor

    @property
    def last_stages(self) -> list[int]:
        return [
            self.last_stage(data, tensor, context)
            for data in range(self.data) for context in range(self.context) for tensor in range(self.tensor)
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """One micro batch of the student, for one replica of the teacher."""

    data: int
    """The student's replica."""
    index: int
    """Of the micro batch, among those of the replica that the teacher scores."""
    wanted: bool = True
    """False where it only keeps the replica in step with the others."""


@dataclass(frozen=True, slots=True)
class Route:
    """From a teacher's last stage to the student's."""

    teacher: Grid
    student: Grid

    def receivers(self, tensor: int) -> range:
        """The student's tensor-parallel ranks that the teacher's `tensor`-th sends to."""
        return range(tensor, self.student.tensor, self.teacher.tensor)

    @property
    def members(self) -> list[int]:
        """Every rank that sends or receives."""
        return sorted({*self.teacher.last_stages, *self.student.last_stages})


@dataclass(frozen=True, slots=True)
class Work:
    """A step's micro batches, dealt to a teacher's replicas."""

    route: Route
    numbers: Sequence[Sequence[int]]
    """The student's numbers of the micro batches that each of its replicas wants scored, rising."""
    _order: dict[tuple[int, int], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        wanted = [
            (number, data, index)
            for data, numbers in enumerate(self.numbers)
            for index, number in enumerate(numbers)
        ]  # fmt: skip
        for place, (_, data, index) in enumerate(sorted(wanted)):
            self._order[data, index] = place

    def jobs(self, replica: int) -> list[Job]:
        """What a replica of the teacher does, in its order. All of them do equally many: their experts wait for each
        other."""
        everything = [Job(data, index) for data, index in self._order]
        mine = everything[replica :: self.route.teacher.data]
        most = -(-len(everything) // self.route.teacher.data)
        return mine + [Job(job.data, job.index, wanted=False) for job in everything[:1] * (most - len(mine))]

    def sender(self, data: int, index: int, tensor: int) -> int:
        """The rank that sends a micro batch to the student's `tensor`-th rank of replica `data`."""
        teacher = self.route.teacher
        return teacher.last_stage(self._order[data, index] % teacher.data, tensor % teacher.tensor)
