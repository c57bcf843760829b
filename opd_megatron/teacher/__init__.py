"""Teachers: frozen models that score the student's tokens; one placement a file.

base.py         the seam: Teacher, Placement, TeacherCost
colocated.py    on the student's own ranks, in its layout: the head lies where the student's does
relaid.py       on the student's own ranks, in a layout of its own
own_ranks.py    on ranks of its own: states micro batch by micro batch, while the student trains
source.py       a model in another layout than the student's; route.py says which rank sends what to which
wire.py         bounded messages between ranks; links.py the groups that they go over
heads.py        LM heads at the student's side, whatever layout their teacher has
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.config import OwnRanksTeacherConfig, RunConfig, StudentRanksTeacherConfig, TeacherConfig
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.models import ResolvedModels
from opd_megatron.models.sizes import RunSizes
from opd_megatron.teacher.base import Placement, Surroundings, Teacher, TeacherCost
from opd_megatron.teacher.colocated import StudentRanks
from opd_megatron.teacher.heads import Heads
from opd_megatron.teacher.links import TeacherLink, join_teachers
from opd_megatron.teacher.own_ranks import OwnRanks, build_host
from opd_megatron.types import Batch, TeacherInputs

__all__ = [
    "Teacher",
    "TeacherCost",
    "TeacherLink",
    "ask_teachers",
    "build_host",
    "build_teachers",
    "check_teachers",
    "join_teachers",
    "meters",
    "teacher_costs",
]

PLACEMENTS: dict[type[TeacherConfig], Placement[Any]] = {
    StudentRanksTeacherConfig: StudentRanks(),
    OwnRanksTeacherConfig: OwnRanks(),
}
"""Config class of an entry of `teachers:` -> what runs it."""


def check_teachers(config: RunConfig, models: ResolvedModels) -> None:
    """Raises ConfigError unless every teacher can have the layout that its entry asks for."""
    for number, (teacher, (_, hf_config)) in enumerate(zip(config.teachers, models.teachers, strict=True)):
        PLACEMENTS[type(teacher)].check(number, teacher, hf_config, config, models.data_parallel)


def teacher_costs(sizes: RunSizes, stage: int) -> list[TeacherCost]:
    """Estimates what each teacher costs a rank of the student's `stage`."""
    teachers = zip(sizes.config.teachers, sizes.models.teachers, strict=True)
    return [PLACEMENTS[type(teacher)].cost(teacher, hf_config, sizes, stage) for teacher, (_, hf_config) in teachers]


def build_teachers(
    config: RunConfig, models: ResolvedModels, grid: ParallelGrid, links: Sequence[TeacherLink | None] | None = None
) -> list[Teacher]:
    """Loads one teacher for each entry of `teachers:`. Every rank of the student's calls it.

    `links`: what `join_teachers` made; none where every teacher has the student's own layout.
    """
    total = sum(teacher.weight for teacher in config.teachers)
    heads = Heads(grid, models.padded_vocab(grid.tp_size))
    return [
        PLACEMENTS[type(teacher)].build(
            teacher, source, teacher.weight / total, Surroundings(config, models, grid, heads, link)
        )
        for teacher, source, link in zip(
            config.teachers, models.teachers, links or [None] * len(config.teachers), strict=True
        )
    ]


def meters(inputs: Sequence[TeacherInputs]) -> dict[str, float]:
    """`teacher/N/bytes` and `teacher/N/waited` (seconds) of a step, on the rank that has most of either; of teachers
    elsewhere alone. Collective over the student's ranks, where there are such."""
    found = {
        f"teacher/{number}/{name}": value
        for number, each in enumerate(inputs)
        if each.meter is not None
        for name, value in each.meter().items()
    }
    if not found:
        return {}
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(found, values.tolist(), strict=True))


def ask_teachers(teachers: Sequence[Teacher], micro_batches: list[Batch]) -> list[TeacherInputs]:
    """Lets all teachers score the micro batches, side by side where they can. Collective over the student's ranks."""
    for teacher in sorted(teachers, key=lambda teacher: not teacher.beside):  # those that nobody waits for first
        teacher.submit(micro_batches)
    return [teacher.collect() for teacher in teachers]
