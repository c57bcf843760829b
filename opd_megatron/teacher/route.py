"""Which replica of a teacher scores which micro batch of the student's replicas, and which rank sends it to which.

Both sides work this out from sizes alone, so that nothing has to be agreed on. Micro batches go round the teacher's
replicas in the order (first of every student replica, second of every one, ..): the student's replicas may wait for
each other in every layer (experts), so that none may get its second before another has got its first.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grid:
    """A model's place in the job: tensor-parallel ranks are neighbours, pipeline stages far apart (`ParallelGrid`)."""

    first: int
    """Rank in the job."""
    tensor: int
    pipeline: int
    data: int

    @property
    def size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.size)

    def last_stage(self, data: int, tensor: int) -> int:
        """The rank that holds final hidden states of a replica."""
        return self.first + ((self.pipeline - 1) * self.data + data) * self.tensor + tensor

    @property
    def last_stages(self) -> list[int]:
        return [self.last_stage(data, tensor) for data in range(self.data) for tensor in range(self.tensor)]


@dataclass(frozen=True, slots=True)
class Job:
    """One micro batch of the student, for one replica of the teacher."""

    data: int
    """The student's replica."""
    index: int
    """Of the micro batch."""
    wanted: bool = True
    """False where it only keeps the replica in step with the others."""


@dataclass(frozen=True, slots=True)
class Route:
    """From a teacher's last stage to the student's."""

    teacher: Grid
    student: Grid

    def replica(self, data: int, index: int) -> int:
        """The teacher's replica that scores a micro batch."""
        return (index * self.student.data + data) % self.teacher.data

    def jobs(self, replica: int, count: int) -> list[Job]:
        """What a replica of the teacher does, in its order, of `count` micro batches a student replica. All of them do
        equally many: their experts wait for each other."""
        everything = [Job(n % self.student.data, n // self.student.data) for n in range(count * self.student.data)]
        mine = everything[replica :: self.teacher.data]
        most = -(-len(everything) // self.teacher.data)
        return mine + [Job(everything[0].data, everything[0].index, wanted=False)] * (most - len(mine))

    def receivers(self, tensor: int) -> range:
        """The student's tensor-parallel ranks that the teacher's `tensor`-th sends to."""
        return range(tensor, self.student.tensor, self.teacher.tensor)

    def sender(self, data: int, index: int, tensor: int) -> int:
        """The rank that sends a micro batch to the student's `tensor`-th rank of replica `data`."""
        return self.teacher.last_stage(self.replica(data, index), tensor % self.teacher.tensor)

    @property
    def members(self) -> list[int]:
        """Every rank that sends or receives."""
        return sorted({*self.teacher.last_stages, *self.student.last_stages})
