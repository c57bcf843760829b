"""Teachers: frozen models that score the student's tokens; one placement a file.

base.py         the seam: Teacher, Placement, TeacherCost
colocated.py    on the student's own ranks: final hidden states, and a head that lies where the student's does
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd_megatron.config import RunConfig, StudentRanksTeacherConfig, TeacherConfig
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.models import ResolvedModels
from opd_megatron.models.sizes import RunSizes
from opd_megatron.teacher.base import Placement, Teacher, TeacherCost
from opd_megatron.teacher.colocated import StudentRanks
from opd_megatron.types import Batch, TeacherInputs

__all__ = ["Teacher", "TeacherCost", "ask_teachers", "build_teachers", "check_teachers", "teacher_costs"]

PLACEMENTS: dict[type[TeacherConfig], Placement[Any]] = {StudentRanksTeacherConfig: StudentRanks()}
"""Config class of an entry of `teachers:` -> what runs it."""


def check_teachers(config: RunConfig, models: ResolvedModels) -> None:
    """Raises ConfigError unless every teacher can have the layout that its entry asks for."""
    for teacher, (_, hf_config) in zip(config.teachers, models.teachers, strict=True):
        PLACEMENTS[type(teacher)].check(teacher, hf_config, config)


def teacher_costs(sizes: RunSizes, stage: int) -> list[TeacherCost]:
    """Estimates what each teacher costs a rank of the student's `stage`."""
    teachers = zip(sizes.config.teachers, sizes.models.teachers, strict=True)
    return [PLACEMENTS[type(teacher)].cost(teacher, hf_config, sizes, stage) for teacher, (_, hf_config) in teachers]


def build_teachers(config: RunConfig, models: ResolvedModels, grid: ParallelGrid) -> list[Teacher]:
    """Loads one teacher for each entry of `teachers:`. Every rank of the run calls it."""
    total = sum(teacher.weight for teacher in config.teachers)
    return [
        PLACEMENTS[type(teacher)].build(teacher, source, models, grid, config, teacher.weight / total)
        for teacher, source in zip(config.teachers, models.teachers, strict=True)
    ]


def ask_teachers(teachers: Sequence[Teacher], micro_batches: list[Batch]) -> list[TeacherInputs]:
    """Lets all teachers score the micro batches, side by side where they can. Collective over the student's ranks."""
    for teacher in teachers:
        teacher.submit(micro_batches)
    return [teacher.collect() for teacher in teachers]
