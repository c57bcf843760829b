"""Teachers: what all of them have, and one class a placement with the keys of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Discriminator, PositiveFloat, Tag

from opd_megatron.config.sections import Precision, Section, UserPath


class TeacherConfig(Section):
    """What every teacher has, wherever it runs. `placement` chooses the class of an entry of `teachers:`."""

    path: UserPath
    """Hugging Face folder or hub id."""
    weight: PositiveFloat = 1.0
    """Share in an ensemble; shares are normalised to sum to one."""


class StudentRanksTeacherConfig(TeacherConfig):
    """A teacher on the student's own ranks, in the same tensor- and pipeline-parallel layout."""

    placement: Literal["student"] = "student"
    """Where the teacher runs: `student` is on the student's own ranks, in its layout."""
    dtype: Precision = "auto"
    """Arithmetic of the teacher's forward pass; `auto` as for the student."""
    offload: bool = False
    """Let its weights wait in pinned host memory while the rollout engine is awake; as `student.offload`."""


def by_placement(*classes: type[TeacherConfig]) -> Any:
    """Builds the annotation of one teacher: the class that its `placement` names, the first class by default."""
    if len(classes) == 1:
        return classes[0]
    names = [kind.model_fields["placement"].default for kind in classes]

    def name_of(entry: Any) -> Any:
        given = entry.get("placement") if isinstance(entry, dict) else getattr(entry, "placement", None)
        return names[0] if given is None else given

    tagged = tuple(Annotated[kind, Tag(name)] for kind, name in zip(classes, names, strict=True))
    return Annotated[Union[tagged], Discriminator(name_of)]  # noqa: UP007  a tuple of any length


if TYPE_CHECKING:
    AnyTeacherConfig = TeacherConfig
else:
    AnyTeacherConfig = by_placement(StudentRanksTeacherConfig)
