"""The divergences, each described once: its value per token and its gradient with respect to the student's logits.

Both forms of the loss (from logits, from hidden states) and every tensor-parallel layout run these descriptions on
blocks of rows over the columns that one rank holds. Adding a divergence means adding one class and one entry to
`DIVERGENCES`. Notation: p student, q teacher, r = log p - log q, d = q - p.

A divergence L = sum_j f(p_j, q_j) has dL/ds_j = p_j (f'(p_j) - sum_i p_i f'(p_i)), derivatives taken in p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

Sums = dict[str, torch.Tensor]
"""Per-token sums over the vocabulary by name, each [R]; `reverse_kl` and `forward_kl` are always among them."""

# exp(80) is finite in fp32, and an entry whose probability is exp(-80) of the other's adds nothing to a mixture.
_LARGEST_LOG_RATIO = 80.0


@dataclass(frozen=True, slots=True)
class Rows:
    """A block of R tokens over this rank's n columns, all [R, n]. Divergences may overwrite `r`, `d`, `work`, `scratch`
    in `gradient`, and the last two (and `r` where it is clamped) in `sums`."""

    p: torch.Tensor
    q: torch.Tensor
    r: torch.Tensor
    """log p - log q."""
    d: torch.Tensor
    """q - p."""
    work: torch.Tensor
    scratch: torch.Tensor


class Divergence(Protocol):
    """A divergence between student and teacher, per token."""

    sum_names: ClassVar[tuple[str, ...]]
    """Names of the sums it needs beyond the two KLs."""

    def sums(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        """This rank's part of each of `sum_names`, each [R]; the parts of all ranks are added."""

    def value(self, sums: Sums) -> torch.Tensor:
        """[R] in nats, from the sums over the whole vocabulary."""

    def gradient(self, rows: Rows, sums: Sums) -> torch.Tensor:
        """[R, n] with respect to the student's logits (already divided by the temperature)."""


def kl_sums(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Reverse KL(p|q) and forward KL(q|p), this rank's parts.

    sum p r + q - p rather than sum p r: no term is negative, and an error in a normaliser enters at second order, so
    that a divergence of 1e-4 keeps its digits in fp32.
    """
    reverse = torch.addcmul(rows.d, rows.p, rows.r, out=rows.scratch).sum(-1)
    forward = torch.addcmul(rows.d, rows.q, rows.r, out=rows.scratch).sum(-1).neg_()
    return reverse, forward


class ReverseKL:
    """KL(p|q): f' = r + 1."""

    sum_names: ClassVar[tuple[str, ...]] = ()

    def sums(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        return ()

    def value(self, sums: Sums) -> torch.Tensor:
        return sums["reverse_kl"]

    def gradient(self, rows: Rows, sums: Sums) -> torch.Tensor:
        return rows.r.sub_(sums["reverse_kl"].unsqueeze(-1)).mul_(rows.p)


class ForwardKL:
    """KL(q|p): f' = -q / p, whose mean under p is -1."""

    sum_names: ClassVar[tuple[str, ...]] = ()

    def sums(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        return ()

    def value(self, sums: Sums) -> torch.Tensor:
        return sums["forward_kl"]

    def gradient(self, rows: Rows, sums: Sums) -> torch.Tensor:
        return rows.d.neg_()


@dataclass(frozen=True)
class GeneralizedJSD:
    """beta KL(q|m) + (1 - beta) KL(p|m) with m = beta q + (1 - beta) p, 0 < beta < 1 (arXiv 2306.13649).

    With u = log m - log p the value is -sum(m u + beta q r) and f' = -(1 - beta) u; the first-order corrections of
    the two KLs cancel, so that this sum has the same immunity to normaliser errors as `kl_sums`.
    """

    beta: float
    sum_names: ClassVar[tuple[str, ...]] = ("generalized_jsd", "student_to_mixture_kl")

    def sums(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        u = self._log_mixture_over_student(rows)
        to_mixture = torch.mul(rows.d, self.beta, out=rows.scratch).addcmul_(rows.p, u, value=-1).sum(-1)
        mixture = torch.add(rows.p, rows.d, alpha=self.beta, out=rows.scratch)
        value = mixture.mul_(u).addcmul_(rows.q, rows.r, value=self.beta).sum(-1).neg_()
        return value, to_mixture

    def value(self, sums: Sums) -> torch.Tensor:
        return sums["generalized_jsd"]

    def gradient(self, rows: Rows, sums: Sums) -> torch.Tensor:
        u = self._log_mixture_over_student(rows)
        return u.add_(sums["student_to_mixture_kl"].unsqueeze(-1)).mul_(rows.p).mul_(self.beta - 1)

    def _log_mixture_over_student(self, rows: Rows) -> torch.Tensor:
        """u in `rows.work`, from whichever side keeps log1p's argument at or above -1/2."""
        r = rows.r.clamp_(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
        if self.beta <= 0.5:
            return torch.neg(r, out=rows.work).expm1_().mul_(self.beta).log1p_()
        return torch.expm1(r, out=rows.work).mul_(1 - self.beta).log1p_().sub_(r)


def _gkd(beta: float) -> Divergence:
    if beta == 0:
        return ForwardKL()
    return ReverseKL() if beta == 1 else GeneralizedJSD(beta)


DIVERGENCES: dict[str, Callable[[float], Divergence]] = {
    "reverse_kl": lambda beta: ReverseKL(),
    "forward_kl": lambda beta: ForwardKL(),
    "gkd": _gkd,
}
"""`type` of the objective to its description, built with beta."""
