"""What connects a teacher in a layout of its own with the student: groups that cross the two, made before any model."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from opd_megatron.config import (
    CachedTeacherConfig,
    OwnRanksTeacherConfig,
    RunConfig,
    StudentRanksTeacherConfig,
    TeacherConfig,
)
from opd_megatron.mcore.cpu.platform import start_store
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.models import ResolvedModels
from opd_megatron.places import Places
from opd_megatron.system.commands import Commands
from opd_megatron.system.groups import cpu_group
from opd_megatron.teacher.route import Grid, Route


@dataclass(frozen=True, slots=True)
class TeacherLink:
    """This rank's end of it."""

    route: Route
    grid: ParallelGrid | None
    """The teacher's; None on ranks that hold none of it."""
    states: dist.ProcessGroup | None
    """Every rank that sends or receives hidden states, in the order of `route.members`; None on other ranks, and where
    there is one rank alone."""
    calls: Commands | None = None
    """To ranks of the teacher's own."""
    told: dist.ProcessGroup | None = None
    """The job's first rank and the teacher's own."""

    def member(self, rank: int) -> int:
        """A rank's number in `states`."""
        return self.route.members.index(rank)


def student_grid(config: RunConfig, models: ResolvedModels) -> Grid:
    parallel = config.parallel
    return Grid(0, parallel.tensor, parallel.pipeline, models.data_parallel, parallel.context)


def own_grid(teacher: TeacherConfig, number: int, student: Grid, places: Places) -> Grid | None:
    """A teacher's layout; None where it is the student's."""
    if isinstance(teacher, OwnRanksTeacherConfig):
        return Grid(places.teachers[number].first, teacher.tensor, teacher.pipeline, teacher.data)
    if isinstance(teacher, CachedTeacherConfig) and teacher.missing == "compute":
        teacher = teacher.computing()
    if isinstance(teacher, StudentRanksTeacherConfig):
        tensor, pipeline = teacher.tensor or student.tensor, teacher.pipeline or student.pipeline
        if (tensor, pipeline) != (student.tensor, student.pipeline):
            return Grid(0, tensor, pipeline, student.size // (tensor * pipeline))
    return None


def join_teachers(config: RunConfig, models: ResolvedModels, places: Places) -> list[TeacherLink | None]:
    """Makes the links, one for each teacher; None for one in the student's own layout. Collective over all ranks of the
    job, while they are one world."""
    student = student_grid(config, models)
    links: list[TeacherLink | None] = []
    for number, teacher in enumerate(config.teachers):
        grid = own_grid(teacher, number, student, places)
        links.append(None if grid is None else _link(config, teacher, number, Route(grid, student)))
    return links


def _link(config: RunConfig, teacher: TeacherConfig, number: int, route: Route) -> TeacherLink:
    layout, rank = route.teacher, dist.get_rank()
    own = isinstance(teacher, OwnRanksTeacherConfig)
    expert = teacher.expert if isinstance(teacher, OwnRanksTeacherConfig) else config.parallel.expert
    built = ParallelGrid.build(
        layout.tensor, layout.pipeline, layout.data, ep_size=expert, rank_offset=layout.first
    )  # fmt: skip
    members = route.members
    states = cpu_group(members) if len(members) > 1 else None
    told = cpu_group([0, *layout.ranks]) if own else None
    return TeacherLink(
        route,
        built if rank in layout.ranks else None,
        states if rank in members else None,
        Commands(start_store(), f"teacher/{number}") if own else None,
        told if own and rank in (0, *layout.ranks) else None,
    )
