"""The backend of plain torch operations: any device, any floating dtype, the fallback of the others."""

from __future__ import annotations

import torch

from opd_megatron.losses.divergences import FORWARD_KL, REVERSE_KL, Divergence
from opd_megatron.losses.kernels.base import LOG_ZERO, Normalisers, Statistics

# A dozen temporaries of this many elements exist at a time: near a CPU's cache, worth a GPU's launches.
_BLOCK_ELEMENTS_CPU = 2**18
_BLOCK_ELEMENTS_GPU = 2**24


class TorchKernels:
    """See `Kernels`. Computes in `dtype` (fp32 or float64)."""

    def __init__(self, divergence: Divergence, temperature: float, dtype: torch.dtype, device: torch.device) -> None:
        self.divergence, self.temperature, self.dtype = divergence, temperature, dtype
        self.block_elements: int | None = _BLOCK_ELEMENTS_CPU if device.type == "cpu" else _BLOCK_ELEMENTS_GPU

    def statistics(self, student: torch.Tensor, teacher: torch.Tensor) -> Statistics:
        student, teacher = self._scaled(student), self._scaled(teacher)
        student_max, where = student.max(dim=-1)
        teacher_max = teacher.amax(dim=-1)
        return Statistics(
            student_max,
            (student - student_max.unsqueeze(-1)).exp_().sum(-1),
            teacher_max,
            (teacher - teacher_max.unsqueeze(-1)).exp_().sum(-1),
            teacher.gather(1, where.unsqueeze(-1)).squeeze(-1),
        )

    def sums(self, student: torch.Tensor, teacher: torch.Tensor, normalisers: Normalisers) -> torch.Tensor:
        log_p, log_q = self._log_probabilities(student, teacher, normalisers)
        p, q, r = log_p.exp(), log_q.exp(), log_p - log_q
        elements = [
            REVERSE_KL.value(p, q, r, 0.0),
            FORWARD_KL.value(p, q, r, 0.0),
            -p * log_p,
            -q * log_q,
            self.divergence.value(p, q, r, self.divergence.parameter),
            self.divergence.weighted_grad(p, q, r, self.divergence.parameter),
        ]
        return torch.stack([x.sum(-1) for x in elements])

    def gradient(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        normalisers: Normalisers,
        divergence_coef: torch.Tensor,
        softmax_coef: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        log_p, log_q = self._log_probabilities(student, teacher, normalisers)
        p = log_p.exp()
        weighted_grad = self.divergence.weighted_grad(p, log_q.exp(), log_p.sub_(log_q), self.divergence.parameter)
        result = weighted_grad.mul_(divergence_coef.unsqueeze(-1)).sub_(p.mul_(softmax_coef.unsqueeze(-1)))
        # Selection, not multiplication: an infinity of a masked token must not become a NaN.
        out.copy_(result.masked_fill_(((divergence_coef == 0) & (softmax_coef == 0)).unsqueeze(-1), 0))

    def fused(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        divergence_coef: torch.Tensor,
        out: torch.Tensor | None,
        with_metrics: bool = True,
    ) -> tuple[Statistics, torch.Tensor]:
        local = self.statistics(student, teacher)
        normalisers = Normalisers(
            local.student_max, local.student_sum.log(), local.teacher_max, local.teacher_sum.log()
        )
        sums = self.sums(student, teacher, normalisers)
        if out is not None:
            softmax_coef = (divergence_coef * sums[-1]).masked_fill(divergence_coef == 0, 0)
            self.gradient(student, teacher, normalisers, divergence_coef, softmax_coef, out)
        return local, sums

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        scaled = logits.to(self.dtype, copy=True)
        if self.temperature != 1:
            scaled.div_(self.temperature)
        return scaled.clamp_(min=LOG_ZERO)

    def _log_probabilities(
        self, student: torch.Tensor, teacher: torch.Tensor, normalisers: Normalisers
    ) -> tuple[torch.Tensor, torch.Tensor]:
        student_max, student_log_sum, teacher_max, teacher_log_sum = (x.unsqueeze(-1) for x in normalisers)
        return (
            self._scaled(student).sub_(student_max).sub_(student_log_sum),
            self._scaled(teacher).sub_(teacher_max).sub_(teacher_log_sum),
        )
