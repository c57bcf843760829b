"""The divergences as one would write them from the formulae: dense, float64, differentiated by autograd."""

from __future__ import annotations

import math

import torch

from opd_megatron.losses.divergences import DIVERGENCES

SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Values of beta, alpha and lambda_coef."""
KINDS: tuple[tuple[str, dict[str, float]], ...] = tuple(
    (name, arguments)
    for name, family in DIVERGENCES.items()
    for arguments in ([{}] if family.argument is None else [{family.argument: share} for share in SHARES])
    if arguments != {"alpha": 1.0}  # the divergence of a distribution from itself
)
"""Every divergence of the package with its own argument: a new one is tested as soon as `FORMULAE` has it."""
NAMES = [" ".join([name, *map(str, arguments.values())]) for name, arguments in KINDS]

TEMPERATURES = (0.5, 1.0, 2.0)
ENSEMBLES: tuple[tuple[str, tuple[float, ...] | None], ...] = (
    ("logit_mean", None),
    ("logit_mean", (0.3, 0.7)),
    ("prob_mean", (0.3, 0.7)),
)
"""combine and teacher weights; None is a single teacher."""


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mixture(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """log(share a + (1 - share) b)."""
    if share in (0, 1):
        return log_a if share else log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log(1 - share))


def _gkd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    if beta in (0, 1):
        return _kl(log_p, log_q) if beta else _kl(log_q, log_p)
    log_m = _mixture(log_q, log_p, beta)
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _lambda_jsd(log_p: torch.Tensor, log_q: torch.Tensor, lambda_coef: float = 0.5) -> torch.Tensor:
    log_m = _mixture(log_p, log_q, 0.5)
    return lambda_coef * _kl(log_p, log_m) + (1 - lambda_coef) * _kl(log_q, log_m)


FORMULAE = {
    "reverse_kl": _kl,
    "forward_kl": lambda log_p, log_q: _kl(log_q, log_p),
    "gkd": _gkd,
    "skew_reverse_kl": lambda log_p, log_q, alpha=0.1: _kl(log_p, _mixture(log_p, log_q, alpha)),
    "skew_forward_kl": lambda log_p, log_q, alpha=0.1: _kl(log_q, _mixture(log_q, log_p, alpha)),
    "lambda_jsd": _lambda_jsd,
}
"""[T] from log-probabilities [T, V]."""


def log_teacher(
    teachers: list[torch.Tensor], temperature: float, combine: str, weights: tuple[float, ...] | None
) -> torch.Tensor:
    """Log-probabilities of an ensemble."""
    weights = weights or (1.0,) * len(teachers)
    scaled = [teacher.double() / temperature for teacher in teachers]
    if combine == "logit_mean":
        return sum(w * t for w, t in zip(weights, scaled, strict=True)).log_softmax(-1)
    return sum(w * t.softmax(-1) for w, t in zip(weights, scaled, strict=True)).log()


def dense_divergence(
    student: torch.Tensor,
    teachers: list[torch.Tensor],
    type: str,
    temperature: float = 1.0,
    combine: str = "logit_mean",
    weights: tuple[float, ...] | None = None,
    **arguments: float,
) -> torch.Tensor:
    """[T] from unpadded logits [T, V]."""
    log_p = (student.double() / temperature).log_softmax(-1)
    return FORMULAE[type](log_p, log_teacher(teachers, temperature, combine, weights), **arguments)


def pad_columns(matrix: torch.Tensor, columns: int, generator: torch.Generator, dim: int = 1) -> torch.Tensor:
    """Appends large random columns (or rows of a head, `dim=0`): if any takes part, every result is wrong."""
    shape = list(matrix.shape)
    shape[dim] = columns - shape[dim]
    garbage = 20 + torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.cat([matrix, garbage.to(matrix.dtype)], dim)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
