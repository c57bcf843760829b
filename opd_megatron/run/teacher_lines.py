"""A line for each teacher at the start of a run: what it is, where it runs, what it scores and reads."""

from __future__ import annotations

from opd_megatron.config import RunConfig, decided
from opd_megatron.config.teachers import (
    CachedTeacherConfig,
    MegatronTeacherConfig,
    OwnRanksTeacherConfig,
    ServedTeacherConfig,
    StudentRanksTeacherConfig,
)
from opd_megatron.models import ResolvedModels
from opd_megatron.models.sizes import parameters


def teacher_lines(config: RunConfig, models: ResolvedModels) -> list[str]:
    """Describes the teachers of a configuration whose fingerprints are filled in."""
    lines = []
    for name, teacher, (_, hf_config) in zip(config.teacher_names, config.teachers, models.teachers, strict=True):
        of_dtype = f" {decided(teacher.dtype)}" if isinstance(teacher, MegatronTeacherConfig) else ""
        called = "" if name == teacher.path else f"{name}: "
        facts = [
            f"{called}{teacher.path}",
            f"{hf_config.model_type} {parameters(hf_config) / 1e6:,.0f}M{of_dtype}",
            _place(teacher),
            *_tasks(config, name),
            *(["a prompt of its own"] if teacher.prompt is not None else []),
            *([f"another tokenizer ({teacher.alignment.replace('_', ' ')})"] if teacher.alignment is not None else []),
            f"fingerprint {teacher.fingerprint}",
        ]
        lines.append("teacher " + ", ".join(fact for fact in facts if fact))
    return lines


def _place(teacher: object) -> str:
    if isinstance(teacher, OwnRanksTeacherConfig):
        return f"on {teacher.ranks} ranks of its own (tensor {teacher.tensor}, pipeline {teacher.pipeline})"
    if isinstance(teacher, StudentRanksTeacherConfig):
        if teacher.update != "frozen":
            return "the student itself" if teacher.update == "live" else "a moving average of the student"
        layout = [f"{key} {size}" for key in ("tensor", "pipeline") if (size := getattr(teacher, key)) is not None]
        return "on the student's ranks" + (f" ({', '.join(layout)})" if layout else "")
    if isinstance(teacher, ServedTeacherConfig):
        return f"served at {', '.join(teacher.urls)}"
    if isinstance(teacher, CachedTeacherConfig):
        rest = ", the rest on the student's ranks" if teacher.missing == "compute" else ""
        return f"cached in {teacher.cache}{rest}"
    return ""


def _tasks(config: RunConfig, name: str) -> list[str]:
    tasks = [task for task, names in config.routes.items() if name in ([names] if isinstance(names, str) else names)]
    return [f"for {' and '.join(tasks)}"] if tasks else []
