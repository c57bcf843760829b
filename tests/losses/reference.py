"""The divergences as one would write them from the formulae: dense, float64, differentiated by autograd."""

from __future__ import annotations

import torch

KINDS = (("reverse_kl", 0.5), ("forward_kl", 0.5), *(("gkd", beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)))
TEMPERATURES = (0.5, 1.0, 2.0)
ENSEMBLES: tuple[tuple[str, tuple[float, ...] | None], ...] = (
    ("logit_mean", None),
    ("logit_mean", (0.3, 0.7)),
    ("prob_mean", (0.3, 0.7)),
)
"""combine and teacher weights; None is a single teacher."""


def dense_divergence(
    student: torch.Tensor,
    teachers: list[torch.Tensor],
    type: str,
    beta: float,
    temperature: float,
    combine: str = "logit_mean",
    weights: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """[T] from unpadded logits [T, V]."""
    log_p = (student.double() / temperature).log_softmax(-1)
    weights = weights or (1.0,) * len(teachers)
    scaled = [teacher.double() / temperature for teacher in teachers]
    if combine == "logit_mean":
        log_q = sum(w * t for w, t in zip(weights, scaled, strict=True)).log_softmax(-1)
    else:
        log_q = sum(w * t.softmax(-1) for w, t in zip(weights, scaled, strict=True)).log()
    if type == "reverse_kl" or (type == "gkd" and beta == 1):
        return _kl(log_p, log_q)
    if type == "forward_kl" or beta == 0:
        return _kl(log_q, log_p)
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def pad_columns(matrix: torch.Tensor, columns: int, generator: torch.Generator, dim: int = 1) -> torch.Tensor:
    """Appends large random columns (or rows of a head, `dim=0`): if any takes part, every result is wrong."""
    shape = list(matrix.shape)
    shape[dim] = columns - shape[dim]
    garbage = 20 + torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.cat([matrix, garbage.to(matrix.dtype)], dim)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
