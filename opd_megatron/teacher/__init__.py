"""Teachers: models that score the student's tokens; one placement a file.

base.py            the seam: Teacher, Placement, TeacherCost
routing.py         which teachers score which sample, and what each reads: its view of a step
student_ranks.py   on the student's own ranks: colocated.py in its layout, relaid.py in one of its own,
                   self_distillation.py the student itself
own_ranks.py       on ranks of its own: states micro batch by micro batch, while the student trains
served.py          on vLLM servers elsewhere; served_client.py what they are asked, and by whom
aligned.py         anywhere, with another tokenizer than the student's
cached.py          nowhere: a pass before has written its states to disk, as states_cache.py says
source.py          a model in another layout than the student's; route.py says which rank sends what to which
wire.py            bounded messages between ranks; links.py the groups that they go over
heads.py           LM heads at the student's side, whatever layout their teacher has
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.config import (
    CachedTeacherConfig,
    MegatronTeacherConfig,
    OwnRanksTeacherConfig,
    RunConfig,
    ServedTeacherConfig,
    StudentRanksTeacherConfig,
    TeacherConfig,
    decided,
)
from opd_megatron.data.alignment import TokenizerPair
from opd_megatron.data.batching import StepBatches
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.student import Student
from opd_megatron.models import ResolvedModels
from opd_megatron.models.sizes import RunSizes
from opd_megatron.teacher.aligned import AlignedTeacher, TranslatedHeads
from opd_megatron.teacher.base import Placement, Surroundings, Teacher, TeacherCost
from opd_megatron.teacher.cached import Cached, CachedTeacher
from opd_megatron.teacher.heads import Heads
from opd_megatron.teacher.links import TeacherLink, join_teachers
from opd_megatron.teacher.own_ranks import OwnRanks, build_host
from opd_megatron.teacher.routing import Routing, Views, check_tasks
from opd_megatron.teacher.self_distillation import LiveTeacher
from opd_megatron.teacher.served import Served
from opd_megatron.teacher.student_ranks import StudentRanks
from opd_megatron.types import Batch, TeacherInputs, TeacherView

__all__ = [
    "AlignedTeacher",
    "CachedTeacher",
    "LiveTeacher",
    "Routing",
    "Teacher",
    "TeacherCost",
    "TeacherLink",
    "Views",
    "ask_teachers",
    "build_host",
    "build_teachers",
    "check_tasks",
    "check_teachers",
    "join_teachers",
    "meters",
    "teacher_costs",
]

PLACEMENTS: dict[type[TeacherConfig], Placement[Any]] = {
    StudentRanksTeacherConfig: StudentRanks(),
    OwnRanksTeacherConfig: OwnRanks(),
    ServedTeacherConfig: Served(),
    CachedTeacherConfig: Cached(),
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
    config: RunConfig,
    models: ResolvedModels,
    grid: ParallelGrid,
    links: Sequence[TeacherLink | None] | None = None,
    student: Student | None = None,
    pairs: Mapping[int, TokenizerPair] | None = None,
) -> list[Teacher]:
    """Loads one teacher for each entry of `teachers:`. Every rank of the student's calls it.

    `links`: what `join_teachers` made; none where every teacher has the student's own layout. `student`: whom a teacher
    follows that is the student itself. `pairs`: of teachers with another tokenizer, by their number.
    """
    total = sum(teacher.weight for number, teacher in enumerate(config.teachers) if number != config.reference) or 1.0
    heads = Heads(grid, models.padded_vocab(grid.tp_size))
    built: list[Teacher] = []
    for number, (teacher, source, link) in enumerate(
        zip(config.teachers, models.teachers, links or [None] * len(config.teachers), strict=True)
    ):
        pair = (pairs or {}).get(number)
        own = heads if pair is None else TranslatedHeads(grid, models, pair)
        around = Surroundings(config, models, grid, own, student, number, link)
        found: Teacher = PLACEMENTS[type(teacher)].build(teacher, source, teacher.weight / total, around)
        if isinstance(own, TranslatedHeads) and isinstance(teacher, MegatronTeacherConfig):
            found = AlignedTeacher(found, own.translated(*source, decided(teacher.dtype)))
        built.append(found)
    return built


def ask_teachers(
    teachers: Sequence[Teacher], micro_batches: list[Batch], views: Views | None = None
) -> list[TeacherInputs]:
    """Lets all teachers score the micro batches, side by side where they can. Collective over the student's ranks.

    `views`: what each of them sees of a step (then `micro_batches` are `StepBatches`); all of it as it is by default.
    """
    shown: list[tuple[list[Batch], TeacherView | None]] = [(micro_batches, None)] * len(teachers)
    if views is not None:
        assert isinstance(micro_batches, StepBatches)
        shown = [views.of(number, micro_batches) for number in range(len(teachers))]
    seconds = [0.0] * len(teachers)
    for number in sorted(range(len(teachers)), key=lambda n: not teachers[n].beside):  # those nobody waits for first
        if _is_anything(shown[number][0]):
            with _timed(seconds, number):
                teachers[number].submit(shown[number][0])
    inputs = []
    for number, (teacher, (batches, view)) in enumerate(zip(teachers, shown, strict=True)):
        with _timed(seconds, number):
            found = teacher.collect()
        tokens = batches.num_tokens if isinstance(batches, StepBatches) else 0
        reference = views is not None and number == views.reference
        inputs.append(replace(found, view=view, tokens=tokens, seconds=seconds[number], reference=reference))
    return inputs


def _is_anything(batches: list[Batch]) -> bool:
    """Whether a teacher sees anything of a step, on any rank; the same on all of them."""
    return not isinstance(batches, StepBatches) or bool(batches.dealt)


@contextmanager
def _timed(seconds: list[float], number: int) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[number] += time.perf_counter() - begin


def meters(inputs: Sequence[TeacherInputs], names: Sequence[str]) -> dict[str, float]:
    """Numbers of a step for each teacher: `teacher/NAME/tokens` scored by it, of all ranks; with another tokenizer the
    share of the student's that is `/aligned` with them; `/seconds` that it took
    the student before its update; and of teachers elsewhere `/bytes` that came from it and seconds `/waited`
    for them in the update; times and bytes on the rank that has most. Collective over the student's ranks."""
    found = {
        f"teacher/{name}/{key}": value
        for name, each in zip(names, inputs, strict=True)
        for key, value in {"seconds": each.seconds, **(each.meter() if each.meter is not None else {})}.items()
    }
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    tokens = {f"teacher/{name}/tokens": float(each.tokens) for name, each in zip(names, inputs, strict=True)}
    for name, each in zip(names, inputs, strict=True):
        if each.view is not None and each.view.aligned_share is not None:
            tokens[f"teacher/{name}/aligned"] = each.view.aligned_share
    return tokens | dict(zip(found, values.tolist(), strict=True))
