"""The inputs and results of `VocabParallelLoss.run`, and what its stages hand on to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from opd_megatron.losses.kernels.base import SUMS
from opd_megatron.losses.policy import PolicyResult, PolicyTerm
from opd_megatron.losses.shared import SharedRows
from opd_megatron.losses.topk import TopKEntries


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The tensors of one `VocabParallelLoss.run`: T tokens, this rank's n columns."""

    student: torch.Tensor
    """Logits [T, n]."""
    teachers: Sequence[torch.Tensor]
    """Logits [T, n] of each."""
    weights: torch.Tensor | None = None
    """[T] in the dtype of `LossSpec`; ones by default."""
    targets: torch.Tensor | None = None
    """[T] global ids of the sampled tokens."""
    policy: PolicyTerm | None = None
    gradient: torch.Tensor | None = None
    """[T, n] to write d sum(weights * loss) / d student to; may be `student`."""
    with_metrics: bool = True
    """Whether the sums that only describe the pair (KLs, entropies) are wanted."""
    entries: TopKEntries | SharedRows | None = None
    """A top-k teacher, for `TopKLoss`; there are no `teachers` then. Or one of another vocabulary, for `SharedLoss`."""


@dataclass(frozen=True, slots=True)
class PerTokenLoss:
    """Per-token results over the whole vocabulary, the same on every rank of the group."""

    sums: torch.Tensor
    """[len(SUMS), T]."""
    top1: torch.Tensor
    """[T] 1 where both models prefer the same token."""
    logprobs: torch.Tensor | None
    """[2, T] of the targets: student, teacher."""
    policy: PolicyResult | None = None

    @property
    def value(self) -> torch.Tensor:
        return self.sums[SUMS.index("value")]


class GlobalSoftmaxStats:
    """Maxima and log sums over the whole vocabulary: row 0 is the student, the others the teacher matrices."""

    def __init__(self, maxima: torch.Tensor, sums: torch.Tensor, at: torch.Tensor) -> None:
        self.maxima, self.log_sums = maxima, sums.log()
        self.at = at
        """[teachers, T], their logits at the student's largest."""


class GradientCoefficients(NamedTuple):
    """Each [T]: grad[j] = divergence_coef * weighted_grad[j] - softmax_coef * p[j]; at the sampled token, target_coef
    is added."""

    divergence_coef: torch.Tensor
    """Weight of the divergence with respect to the logits as they came in."""
    softmax_coef: torch.Tensor
    target_coef: torch.Tensor | None
    """Weight of the policy term, if there is one."""
