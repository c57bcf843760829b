"""The rules of `teachers:` and `routes:` as a whole. Each raises ValueError, which becomes the error of the key."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Protocol

from opd_megatron.config.objective import ObjectiveConfig
from opd_megatron.config.sections import ParallelConfig
from opd_megatron.config.teachers import REFERENCE, STUDENT, AnyTeacherConfig
from opd_megatron.losses.objectives import OBJECTIVES


class Taught(Protocol):
    """What of a `RunConfig` the rules are about."""

    teachers: list[AnyTeacherConfig]
    routes: dict[str, str | list[str]]
    parallel: ParallelConfig
    objective: ObjectiveConfig

    @property
    def teacher_names(self) -> list[str]: ...
    @property
    def teacher_sets(self) -> list[list[str]]: ...


def check_teachers(config: Taught) -> None:
    """Raises ValueError for the first rule that is broken."""
    _check_names(config)
    _check_self_teachers(config)
    _check_aligned_teachers(config)
    _check_weights(config)
    _check_context(config)


def _check_context(config: Taught) -> None:
    """Checks that teachers see the same tokens at the same places where ranks share a sequence."""
    context = config.parallel.context
    for number, teacher in enumerate(config.teachers):
        for key in ("prompt", "alignment"):
            if context > 1 and getattr(teacher, key) is not None:
                raise ValueError(
                    f"teachers.{number}.{key} does not go with parallel.context={context}: its sequences have other "
                    "lengths, so that other ranks would hold the same token; set parallel.context=1"
                )


def _check_names(config: Taught) -> None:
    names = config.teacher_names
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"teachers: name {twice[0]!r} is given twice: every teacher needs a name of its own")
    used = []
    for task, members in config.routes.items():
        members = [members] if isinstance(members, str) else members
        for name in members:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(
                    f"routes.{task} names teacher {name!r}, of which there is none{hint}: use names of teachers "
                    f"({', '.join(names)})"
                )
        if len({*members}) < len(members):
            raise ValueError(f"routes.{task}={members} names a teacher twice: set its weight instead")
        used += members
    if REFERENCE in used:
        raise ValueError(
            f"routes name {REFERENCE!r}, which is what objective.reference_kl is about: leave it out there"
        )
    idle = [name for name in names if config.routes and name not in used and name != REFERENCE]
    if idle:
        raise ValueError(f"teacher {idle[0]!r} is in no route: name it in routes, or leave it out of teachers")


def _check_aligned_teachers(config: Taught) -> None:
    """Checks those with another tokenizer."""
    sampled = bool(OBJECTIVES[config.objective.type].term(config.objective).policy)
    fits = "spans" if sampled else "shared_vocabulary"
    for number, teacher in enumerate(config.teachers):
        key = f"teachers.{number}.alignment={teacher.alignment}"
        if teacher.alignment is None:
            continue
        if teacher.is_student:
            raise ValueError(f"{key} has no effect with teachers.{number}.path={STUDENT}: leave it out")
        if teacher.alignment != fits:
            raise ValueError(
                f"{key} does not go with objective.type={config.objective.type}, which "
                + ("scores sampled tokens" if sampled else "compares distributions")
                + f": set it to {fits}, or choose another objective"
            )
        if getattr(teacher, "top_k", None) is not None:
            raise ValueError(f"{key} needs the hidden states of its teacher: leave teachers.{number}.top_k out")
        if any(config.teacher_names[number] in names and len(names) > 1 for names in config.teacher_sets):
            raise ValueError(
                f"{key} cannot be one of an ensemble of distributions over one vocabulary: give it a route of its own"
            )


def _check_self_teachers(config: Taught) -> None:
    for number, teacher in enumerate(config.teachers):
        keys = f"teachers.{number}"
        update = getattr(teacher, "update", "frozen")
        if update != "frozen" and not teacher.is_student:
            raise ValueError(
                f"{keys}.update={update} needs {keys}.path={STUDENT}, got {teacher.path!r}: another model does not "
                "change"
            )
        if getattr(teacher, "decay", None) is not None and update != "ema":
            raise ValueError(f"{keys}.decay has no effect with {keys}.update={update}: leave it out, or set ema")
        layout = [name for name in ("tensor", "pipeline") if getattr(teacher, name, None) is not None]
        if update != "frozen" and layout:
            raise ValueError(f"{keys}.update={update} needs the student's own layout: leave {keys}.{layout[0]} out")
        if update == "live" and teacher.prompt is None:
            raise ValueError(
                f"{keys}.update=live without {keys}.prompt is the student itself, which teaches nothing: "
                "give it a prompt that tells more, such as '{prompt} (solution: {answer})', or set update=ema"
            )


def _check_weights(config: Taught) -> None:
    """Checks shares below 0."""
    for number, teacher in enumerate(config.teachers):
        if teacher.weight == 0:
            raise ValueError(f"teachers.{number}.weight=0 is no teacher: leave it out, or give it a weight")
    shares = dict(zip(config.teacher_names, config.teachers, strict=True))
    for names in config.teacher_sets:
        total = sum(shares[name].weight for name in names)
        below = [
            f"teachers.{number}.weight={shares[name].weight}"
            for number, name in enumerate(config.teacher_names)
            if name in names and shares[name].weight < 0
        ]
        if below and config.objective.combine != "logit_mean":
            raise ValueError(
                f"{below[0]}, which needs objective.combine=logit_mean, got {config.objective.combine}: a mean of "
                "probabilities cannot be pushed away from one"
            )
        if below and total <= 0:
            raise ValueError(
                f"{below[0]}, and all weights of {', '.join(names)} sum to {total:g}, which must be above 0: raise "
                "the others"
            )
