"""What a backend computes on one rank's columns of a block of tokens. Shapes: R tokens, n columns.

Every backend takes the same arguments and gives the same numbers: `torch` everywhere, `cpu` (numba) on a CPU, `triton`
on a GPU. A test compares each with the dense float64 reference.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

SUMS = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "value", "weighted_grad")
"""Per-token sums over the vocabulary: both KLs, both entropies, the divergence, and the sum of its `weighted_grad`."""

# Stands for log 0, so that 0 * log 0 is 0.
LOG_ZERO = -1e30


class Statistics(NamedTuple):
    """Statistics of this rank's columns of the logits over the temperature. Each [R]."""

    student_max: torch.Tensor
    student_sum: torch.Tensor
    """sum exp(logit - student_max)."""
    teacher_max: torch.Tensor
    teacher_sum: torch.Tensor
    teacher_at_student_max: torch.Tensor
    """The teacher's logit at the student's first largest one."""


class Normalisers(NamedTuple):
    """log p = (logit / temperature - student_max) - student_log_sum, of the whole vocabulary. Each [R].

    Maximum and log sum stay apart: logits of 1e4 would swallow the digits of their sum.
    """

    student_max: torch.Tensor
    student_log_sum: torch.Tensor
    teacher_max: torch.Tensor
    teacher_log_sum: torch.Tensor


class Kernels(Protocol):
    """One divergence at one temperature. Logits are [R, n] with unit column stride, n > 0; `out` may be `student`."""

    block_elements: int | None
    """Elements of [R, n] that one call should not exceed, because it makes temporaries; None = no bound."""

    def statistics(self, student: torch.Tensor, teacher: torch.Tensor) -> Statistics: ...

    def sums(self, student: torch.Tensor, teacher: torch.Tensor, normalisers: Normalisers) -> torch.Tensor:
        """Computes this rank's part of each of `SUMS`, [len(SUMS), R]."""
        ...

    def gradient(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        normalisers: Normalisers,
        divergence_coef: torch.Tensor,
        softmax_coef: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Writes out = divergence_coef * weighted_grad - softmax_coef * p; a row whose two coefs are 0 is exactly 0."""
        ...

    def fused(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        divergence_coef: torch.Tensor,
        out: torch.Tensor | None,
        with_metrics: bool = True,
    ) -> tuple[Statistics, torch.Tensor]:
        """One fused pass, for an unsharded vocabulary: statistics, sums, and out = divergence_coef * d value / d logits
        (over the temperature). Without `with_metrics` it may skip the KLs and entropies, and leave them 0."""
        ...
