"""The seam to teachers: final hidden states for a batch, and the head that turns them into logits.

A teacher never ships logits. To add a transport (own ranks, a cache on disk, a server), write one class with
these members in a file of its own and choose it in `teacher.build_teachers`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from opd_megatron.types import Batch, TeacherStates


class Teacher(Protocol):
    """A frozen model that scores the student's tokens."""

    weight: float
    """Share in an ensemble; all shares sum to one."""
    vocab_size: int
    """Rows of its embedding that mean something."""

    @property
    def head(self) -> torch.Tensor | None:
        """[v, h]: its LM head resharded to the student's tensor-parallel ranks; None off the last stage."""

    def hidden_states(self, micro_batches: list[Batch]) -> TeacherStates:
        """Final hidden states at the response positions of each micro batch. Collective over the student's ranks."""
