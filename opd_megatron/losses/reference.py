"""The divergences as one would write them from the formulae: dense, float64, differentiated by autograd.

This is what `linear_divergence` and `vocab_parallel_divergence` compute, without a process group, chunks or a memory
bound. Read it first; the tests compare every form, layout and backend with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


def dense_divergence(
    student: torch.Tensor,
    teachers: Sequence[torch.Tensor],
    type: str,
    temperature: float = 1.0,
    combine: str = "logit_mean",
    weights: Sequence[float] | None = None,
    **parameter: float,
) -> torch.Tensor:
    """Computes the per-token divergence [T] in nats from unpadded logits [T, V].

    Args:
        weights: of the teachers, sum to one; equal by default.
        parameter: the divergence's own, e.g. `beta=0.3`.
    """
    log_p = (student.double() / temperature).log_softmax(-1)
    return FORMULAE[type](log_p, log_teacher(teachers, temperature, combine, weights), **parameter)


def log_teacher(
    teachers: Sequence[torch.Tensor], temperature: float, combine: str, weights: Sequence[float] | None
) -> torch.Tensor:
    """Log-probabilities [T, V] of an ensemble: of the mean logits, or of the mean probabilities."""
    weights = weights or (1.0 / len(teachers),) * len(teachers)
    scaled = [teacher.double() / temperature for teacher in teachers]
    if combine == "logit_mean":
        return torch.stack([w * t for w, t in zip(weights, scaled, strict=True)]).sum(0).log_softmax(-1)
    return torch.stack([w * t.softmax(-1) for w, t in zip(weights, scaled, strict=True)]).sum(0).log()


def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """KL(a|b) = sum a (log a - log b)."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mixture(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """log(share a + (1 - share) b)."""
    if share in (0, 1):
        return log_a if share else log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log(1 - share))


def gkd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """beta KL(q|m) + (1 - beta) KL(p|m), m = beta q + (1 - beta) p (arXiv 2306.13649)."""
    if beta in (0, 1):
        return kl(log_p, log_q) if beta else kl(log_q, log_p)
    log_m = mixture(log_q, log_p, beta)
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def lambda_jsd(log_p: torch.Tensor, log_q: torch.Tensor, lambda_coef: float = 0.5) -> torch.Tensor:
    """lambda KL(p|m) + (1 - lambda) KL(q|m), m = (p + q) / 2."""
    log_m = mixture(log_p, log_q, 0.5)
    return lambda_coef * kl(log_p, log_m) + (1 - lambda_coef) * kl(log_q, log_m)


def mixed(log_p: torch.Tensor, log_q: torch.Tensor, forward_weight: float = 0.5) -> torch.Tensor:
    """weight KL(q|p) + (1 - weight) KL(p|q)."""
    return forward_weight * kl(log_q, log_p) + (1 - forward_weight) * kl(log_p, log_q)


def clipped_kl(log_a: torch.Tensor, log_b: torch.Tensor, entry_clip: float) -> torch.Tensor:
    """Sum of min(a log(a / b), clip) (arXiv 2601.18734)."""
    return (log_a.exp() * (log_a - log_b)).clamp(max=entry_clip).sum(-1)


FORMULAE: dict[str, Callable[..., torch.Tensor]] = {
    "reverse_kl": kl,
    "forward_kl": lambda log_p, log_q: kl(log_q, log_p),
    "gkd": gkd,
    "skew_reverse_kl": lambda log_p, log_q, alpha=0.1: kl(log_p, mixture(log_p, log_q, alpha)),
    "skew_forward_kl": lambda log_p, log_q, alpha=0.1: kl(log_q, mixture(log_q, log_p, alpha)),
    "lambda_jsd": lambda_jsd,
    "mixed": mixed,
    "clipped_reverse_kl": lambda log_p, log_q, entry_clip=0.05: clipped_kl(log_p, log_q, entry_clip),
    "clipped_forward_kl": lambda log_p, log_q, entry_clip=0.05: clipped_kl(log_q, log_p, entry_clip),
}
"""Per-token divergence [T] from log-probabilities [T, V] of student p and teacher q; one for each of `DIVERGENCES`."""
