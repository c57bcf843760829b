"""The divergences, each described once: its value and its gradient, one vocabulary entry at a time.

Both forms of the loss, every tensor-parallel layout, the sampled-token advantages, top-k teachers and all backends
(torch, compiled for the CPU, Triton) run these functions. Adding a divergence means writing two functions, one entry of
`DIVERGENCES` and, for the tests, its formula in losses/reference.py: they are parametrised over that table.

Notation: p student, q teacher, r = log p - log q, all of one vocabulary entry; `parameter` is the divergence's own
number (beta, alpha or lambda). A divergence is L = sum_j f(p_j, q_j), and with respect to the student's logits s

    dL/ds_j = g_j - p_j sum_i g_i,      g_j = p_j df/dp_j, called `weighted_grad`.

A constant added to df/dp drops out of the gradient: we choose it so that `weighted_grad` is 0 where p = q, which keeps
the digits of a small gradient. `value` adds a multiple of q - p (`q_minus_p`) to every term. The additions cancel in
the sum, but make each term non-negative, so rounding errors do not swamp a tiny KL: 1e-4 keeps its digits in fp32.

`df_dp`, of the sampled-token forms, relies on f being homogeneous, f(c p, c q) = c f(p, q), which every f-divergence
and every mixture of them is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd_megatron.losses.core.elementwise import Elementwise, at_least, at_most, expm1, log1p, where

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Divergence:
    """One divergence with its parameter bound."""

    value: Elementwise
    weighted_grad: Elementwise
    parameter: float = 0.0

    def df_dp(self, r: torch.Tensor) -> torch.Tensor:
        """Computes df/dp up to a constant, from r = log p - log q alone (f is homogeneous)."""
        return self.weighted_grad(r.new_ones(r.shape), (-r).exp(), r, self.parameter)


def q_minus_p(p, q, r):  # type: ignore[no-untyped-def]
    """q - p. Where they are close it is p (exp(-r) - 1), which cannot disagree with r as a rounded difference would."""
    square = r * r
    even = 0.5 + square * (1.0 / 24.0 + square * (1.0 / 720.0))
    odd = 1.0 / 6.0 + square * (1.0 / 120.0 + square * (1.0 / 5040.0))
    return where(square < 0.25, p * (square * (even - r * odd) - r), q - p)


def mixture_ratios(r, weight):  # type: ignore[no-untyped-def]
    """(|r|, smaller / larger - 1, m / larger - 1) of p and q for m = weight q + (1 - weight) p.

    From the larger of the two nothing cancels, however far apart or close they are.
    """
    distance = where(r < 0.0, -r, r)
    smaller = expm1(-at_most(distance, 80.0))  # exp(-80) of the other adds nothing to a mixture
    # A share of 1 - 1e-8 is 1 in fp32, and log1p(-1) would be infinite.
    return distance, smaller, at_least(where(r < 0.0, (1.0 - weight) * smaller, weight * smaller), -0.99999994)


def q_minus_p_stable(p, q, r, smaller):  # type: ignore[no-untyped-def]
    """q - p from `mixture_ratios`'s smaller / larger - 1, which has all its digits."""
    return smaller * where(r < 0.0, -q, p)


def log_mixture(r, weight):  # type: ignore[no-untyped-def]
    """(log m - log p, log m - log q)."""
    distance, _, mixture = mixture_ratios(r, weight)
    from_larger = log1p(mixture)
    from_smaller = from_larger + distance
    return where(r < 0.0, from_smaller, from_larger), where(r < 0.0, from_larger, from_smaller)


def mixture_share_minus_one(r, weight):  # type: ignore[no-untyped-def]
    """(p / m - 1, q / m - 1)."""
    _, smaller, mixture = mixture_ratios(r, weight)
    larger_less_m, smaller_less_m = -mixture, smaller - mixture
    p_less_m = where(r < 0.0, smaller_less_m, larger_less_m)
    q_less_m = where(r < 0.0, larger_less_m, smaller_less_m)
    return p_less_m / (1.0 + mixture), q_less_m / (1.0 + mixture)


def reverse_kl_value(p, q, r, parameter):  # type: ignore[no-untyped-def]
    return p * r + q_minus_p(p, q, r)


def reverse_kl_weighted_grad(p, q, r, parameter):  # type: ignore[no-untyped-def]
    return p * r


def forward_kl_value(p, q, r, parameter):  # type: ignore[no-untyped-def]
    return -(q_minus_p(p, q, r) + q * r)


def forward_kl_weighted_grad(p, q, r, parameter):  # type: ignore[no-untyped-def]
    return p - q


def gkd_value(p, q, r, beta):  # type: ignore[no-untyped-def]
    """beta KL(q|m) + (1 - beta) KL(p|m), m = beta q + (1 - beta) p (arXiv 2306.13649)."""
    log_m_over_p, log_m_over_q = log_mixture(r, beta)
    return -((1.0 - beta) * (p * log_m_over_p) + beta * (q * log_m_over_q))


def gkd_weighted_grad(p, q, r, beta):  # type: ignore[no-untyped-def]
    log_m_over_p, _ = log_mixture(r, beta)
    return (beta - 1.0) * (p * log_m_over_p)


def skew_reverse_kl_value(p, q, r, alpha):  # type: ignore[no-untyped-def]
    """KL(p|m), m = alpha p + (1 - alpha) q (DistiLLM, arXiv 2402.03898)."""
    _, smaller, _ = mixture_ratios(r, 1.0 - alpha)
    log_m_over_p, _ = log_mixture(r, 1.0 - alpha)
    return (1.0 - alpha) * q_minus_p_stable(p, q, r, smaller) - p * log_m_over_p


def skew_reverse_kl_weighted_grad(p, q, r, alpha):  # type: ignore[no-untyped-def]
    log_m_over_p, _ = log_mixture(r, 1.0 - alpha)
    p_share, _ = mixture_share_minus_one(r, 1.0 - alpha)
    return -(p * (log_m_over_p + alpha * p_share))


def skew_forward_kl_value(p, q, r, alpha):  # type: ignore[no-untyped-def]
    """KL(q|m), m = alpha q + (1 - alpha) p (DistiLLM, arXiv 2402.03898)."""
    _, smaller, _ = mixture_ratios(r, alpha)
    _, log_m_over_q = log_mixture(r, alpha)
    return -((1.0 - alpha) * q_minus_p_stable(p, q, r, smaller) + q * log_m_over_q)


def skew_forward_kl_weighted_grad(p, q, r, alpha):  # type: ignore[no-untyped-def]
    _, q_share = mixture_share_minus_one(r, alpha)
    return (alpha - 1.0) * (p * q_share)


def lambda_jsd_value(p, q, r, weight):  # type: ignore[no-untyped-def]
    """weight KL(p|m) + (1 - weight) KL(q|m), m = (p + q) / 2."""
    _, smaller, _ = mixture_ratios(r, 0.5)
    log_m_over_p, log_m_over_q = log_mixture(r, 0.5)
    return (weight - 0.5) * q_minus_p_stable(p, q, r, smaller) - (
        weight * (p * log_m_over_p) + (1.0 - weight) * (q * log_m_over_q)
    )


def lambda_jsd_weighted_grad(p, q, r, weight):  # type: ignore[no-untyped-def]
    log_m_over_p, _ = log_mixture(r, 0.5)
    p_share, _ = mixture_share_minus_one(r, 0.5)
    # q / (2 m) is 1 - p / (2 m), and the constant drops out.
    return -(p * (weight * log_m_over_p + (weight - 0.5) * p_share))


def mixed_value(p, q, r, weight):  # type: ignore[no-untyped-def]
    """weight KL(q|p) + (1 - weight) KL(p|q)."""
    return (1.0 - weight) * (p * r) - weight * (q * r) + (1.0 - 2.0 * weight) * q_minus_p(p, q, r)


def mixed_weighted_grad(p, q, r, weight):  # type: ignore[no-untyped-def]
    return weight * (p - q) + (1.0 - weight) * (p * r)


def clipped_reverse_kl_value(p, q, r, clip):  # type: ignore[no-untyped-def]
    """min(p log(p / q), clip), an entry's part of reverse KL: the largest are cut (OPSD, arXiv 2601.18734)."""
    return where(p * r > clip, clip + q_minus_p(p, q, r), p * r + q_minus_p(p, q, r))


def clipped_reverse_kl_weighted_grad(p, q, r, clip):  # type: ignore[no-untyped-def]
    return where(p * r > clip, -p, p * r)  # of the value: a cut entry is a constant, less p


def clipped_forward_kl_value(p, q, r, clip):  # type: ignore[no-untyped-def]
    """min(q log(q / p), clip), an entry's part of forward KL."""
    return where(-(q * r) > clip, clip - q_minus_p(p, q, r), -(q_minus_p(p, q, r) + q * r))


def clipped_forward_kl_weighted_grad(p, q, r, clip):  # type: ignore[no-untyped-def]
    return where(-(q * r) > clip, p, p - q)


REVERSE_KL = Divergence(reverse_kl_value, reverse_kl_weighted_grad)
FORWARD_KL = Divergence(forward_kl_value, forward_kl_weighted_grad)


def _gkd(beta: float) -> Divergence:
    if beta == 0:
        return FORWARD_KL
    return REVERSE_KL if beta == 1 else Divergence(gkd_value, gkd_weighted_grad, beta)


def _skew_reverse_kl(alpha: float) -> Divergence:
    return REVERSE_KL if alpha == 0 else Divergence(skew_reverse_kl_value, skew_reverse_kl_weighted_grad, alpha)


def _skew_forward_kl(alpha: float) -> Divergence:
    return FORWARD_KL if alpha == 0 else Divergence(skew_forward_kl_value, skew_forward_kl_weighted_grad, alpha)


def _lambda_jsd(weight: float) -> Divergence:
    return Divergence(lambda_jsd_value, lambda_jsd_weighted_grad, weight)


def _mixed(weight: float) -> Divergence:
    if weight == 0:
        return REVERSE_KL
    return FORWARD_KL if weight == 1 else Divergence(mixed_value, mixed_weighted_grad, weight)


def _clipped_reverse_kl(clip: float) -> Divergence:
    return Divergence(clipped_reverse_kl_value, clipped_reverse_kl_weighted_grad, clip)


def _clipped_forward_kl(clip: float) -> Divergence:
    return Divergence(clipped_forward_kl_value, clipped_forward_kl_weighted_grad, clip)


@dataclass(frozen=True, slots=True)
class Parameter:
    """The number of its own that a divergence takes, in [0, 1] unless it says otherwise."""

    name: str
    """Keyword of the loss functions, and key of `objective:`."""
    default: float
    meaning: str
    """Of its values, as the documentation and an error say it."""
    not_one: str | None = None
    """Why 1 is refused, where it is."""
    above_zero: bool = False
    """It is positive, and may be above 1."""


BETA = Parameter("beta", 0.5, "0 is forward KL, 1 is reverse KL")
ALPHA = Parameter("alpha", 0.1, "0 is the plain KL, 0.1 is usual", not_one="compares a distribution with itself")
LAMBDA_COEF = Parameter("lambda_coef", 0.5, "0.5 is the Jensen-Shannon divergence")
FORWARD_WEIGHT = Parameter("forward_weight", 0.5, "0 is reverse KL, 1 is forward KL")
ENTRY_CLIP = Parameter("entry_clip", 0.05, "nats that one entry of the vocabulary may add", above_zero=True)


@dataclass(frozen=True, slots=True)
class DivergenceFamily:
    """What `type` names: a divergence for every value of its parameter."""

    make: Callable[[float], Divergence]
    parameter: Parameter | None = None
    of_entries: bool = False
    """It looks at single entries of the vocabulary, and so has no meaning where some are one event together."""

    @property
    def argument(self) -> str | None:
        """Name of the parameter."""
        return None if self.parameter is None else self.parameter.name


DIVERGENCES: dict[str, DivergenceFamily] = {
    "reverse_kl": DivergenceFamily(lambda _: REVERSE_KL),
    "forward_kl": DivergenceFamily(lambda _: FORWARD_KL),
    "gkd": DivergenceFamily(_gkd, BETA),
    "skew_reverse_kl": DivergenceFamily(_skew_reverse_kl, ALPHA),
    "skew_forward_kl": DivergenceFamily(_skew_forward_kl, ALPHA),
    "lambda_jsd": DivergenceFamily(_lambda_jsd, LAMBDA_COEF),
    "mixed": DivergenceFamily(_mixed, FORWARD_WEIGHT),
    "clipped_reverse_kl": DivergenceFamily(_clipped_reverse_kl, ENTRY_CLIP, of_entries=True),
    "clipped_forward_kl": DivergenceFamily(_clipped_forward_kl, ENTRY_CLIP, of_entries=True),
}

PARAMETERS: dict[str, Parameter] = {
    family.parameter.name: family.parameter for family in DIVERGENCES.values() if family.parameter is not None
}
"""Every divergence's own number, by its name."""
