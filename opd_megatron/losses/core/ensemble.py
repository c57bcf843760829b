"""Several teachers as one: their logits mixed into a block that the passes over the vocabulary read like any other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from opd_megatron.losses.kernels.base import LOG_ZERO


def mean_logits(teachers: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Computes sum_i w_i t_i, [R, n]."""
    mixed = teachers[0].to(dtype, copy=True).mul_(weights[0])
    for weight, logits in zip(weights[1:], teachers[1:], strict=True):
        mixed.add_(logits, alpha=weight)
    return mixed


def mean_probabilities(
    teachers: Sequence[torch.Tensor],
    weights: Sequence[float],
    temperature: float,
    maxima: torch.Tensor,
    log_sums: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Computes logits whose softmax at `temperature` is sum_i w_i q_i and whose normaliser is 0, [R, n].

    Args:
        maxima: [teachers, R], of logits / temperature over the whole vocabulary.
        log_sums: [teachers, R], log sum exp(logits / temperature - maxima).
    """
    mixed: torch.Tensor | None = None
    for i, (weight, logits) in enumerate(zip(weights, teachers, strict=True)):
        log_q = logits.to(dtype, copy=True)
        if temperature != 1:
            log_q.div_(temperature)
        log_q.clamp_(min=LOG_ZERO).sub_(maxima[i].unsqueeze(-1)).sub_((log_sums[i] - math.log(weight)).unsqueeze(-1))
        mixed = log_q if mixed is None else torch.logaddexp(mixed, log_q, out=mixed)
    assert mixed is not None
    return mixed.mul_(temperature) if temperature != 1 else mixed
