"""The seam to teachers: score the student's tokens, give the loss what it takes of them.

A teacher never ships logits. Whatever it hands over travels unopened to the loss, which alone tells a (hidden states,
head) pair from top-k entries. To add a placement (own ranks, a cache on disk, a server): a config class in
`config/teachers.py`, the two classes below in a file of its own here, and a row in `teacher.PLACEMENTS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from transformers import PretrainedConfig

from opd_megatron.config import ParallelConfig, RunConfig, TeacherConfig
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.student import Student
from opd_megatron.models import ResolvedModels
from opd_megatron.models.sizes import RunSizes
from opd_megatron.teacher.heads import Heads
from opd_megatron.teacher.links import TeacherLink
from opd_megatron.types import Batch, TeacherInputs

Config = TypeVar("Config", bound=TeacherConfig, contravariant=True)


class Teacher(Protocol):
    """A model that scores the student's tokens and learns nothing of its own."""

    beside: bool
    """Whether `submit` returns at once and the scores are made beside other work."""
    changes: bool
    """Whether its weights change while the student trains."""

    def submit(self, micro_batches: list[Batch]) -> None:
        """Starts to score the response positions of a step: of the micro batches that the teacher sees, none of which
        may be this rank's. Collective over the student's ranks."""

    def collect(self) -> TeacherInputs:
        """Waits for what was submitted since the last call and returns it, one output a micro batch; none where a step
        had nothing for the teacher. Collective like `submit`."""

    def after_step(self) -> None:
        """The student has made an optimizer step. Every rank calls it."""

    def move_out(self) -> None:
        """Frees what GPU memory its entry says, until `move_back`: the engines sample. Every rank calls it."""

    def move_back(self) -> None:
        """Makes it ready to score again."""

    def close(self) -> None:
        """Frees what the teacher holds besides this process's memory. Safe to call twice."""


@dataclass(frozen=True, slots=True)
class TeacherCost:
    """What one teacher adds to a rank of the student's and to its step, for `plan`."""

    memory: dict[str, float]
    """Bytes by what they are for: `teachers` (frozen weights), `teacher heads`, `teacher states`."""
    logits_bytes: float = 0.0
    """Bytes of one token's logits on a rank of the last stage while the loss computes them."""
    tensor_bytes: float = 0.0
    """Hidden-state bytes that the tensor-parallel collectives of a forward pass sum for one token."""
    pipeline_bytes: float = 0.0
    """Hidden-state bytes of one token that a stage sends to the next."""
    expert_bytes: float = 0.0
    """Bytes of one token that go to experts and come back, over all layers."""
    states_bytes: float = 0.0
    """Bytes a step that a rank receives from ranks of the teacher's own."""
    flops: float = 0.0
    """Of a step, on the student's ranks together."""
    away: float = 0.0
    """Bytes of `memory` that leave the GPU while the rollout engine is awake."""
    layout: ParallelConfig | None = None
    """Of its own; None where it is the student's, or the teacher is no model of this job's."""
    own_ranks: int = 0
    """Ranks of the teacher's own, which score beside the student's work."""
    own_flops: float = 0.0
    """Of a step, on those together."""
    own_memory: dict[str, float] = field(default_factory=dict)
    """Bytes on each of them."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a teacher is built among."""

    config: RunConfig
    models: ResolvedModels
    grid: ParallelGrid
    """The student's."""
    heads: Heads
    """LM heads where the student's lies."""
    student: Student | None
    """None where teachers alone are built."""
    number: int
    """Of the teacher in `teachers:`."""
    link: TeacherLink | None
    """To ranks or a layout of its own; None where it has neither."""


class Placement(Protocol[Config]):
    """What `plan` and the checks ask of a placement before a process group exists, and how a teacher is built."""

    def check(
        self, number: int, teacher: Config, hf_config: PretrainedConfig, config: RunConfig, data_parallel: int
    ) -> None:
        """Raises ConfigError unless the teacher, entry `number`, can have the layout that it asks for."""

    def cost(self, teacher: Config, hf_config: PretrainedConfig, sizes: RunSizes, stage: int) -> TeacherCost:
        """Estimates what the teacher costs a rank of the student's `stage`."""

    def build(
        self, teacher: Config, source: tuple[Path, PretrainedConfig], weight: float, surroundings: Surroundings
    ) -> Teacher:
        """Loads the teacher. `weight`: its share, of shares that sum to one. Every rank of the student's calls it."""
