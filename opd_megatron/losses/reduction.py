"""From per-token terms to the numbers a step reports: sums over tokens, divided once by one global token count.

Megatron's contract for a loss function is (loss_sum, num_tokens, metrics); a mean of per-rank or per-micro-batch
means would weight tokens unequally, so only sums travel until `global_means`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.losses.linear import DivergenceTerms
from opd_megatron.losses.objectives import DIVERGENCE_METRICS, POLICY_METRICS, SFT_LOSS

MISMATCH, LOGPROB_GAP = "mismatch", "logprob_gap"
_LARGEST_DIFFERENCE = 20.0
"""Nats; e to the power of more would say no more, and drown every other token."""


@dataclass(frozen=True, slots=True)
class TokenSums:
    """One micro batch, summed over its response tokens."""

    loss_sum: torch.Tensor
    """Scalar, fp32 (float64 for float64 models), differentiable."""
    num_tokens: torch.Tensor
    """Scalar int64: tokens whose weight is not 0."""
    sums: torch.Tensor
    """[len(names)] float64, detached: `global_means` adds those of micro batches and ranks."""
    names: tuple[str, ...]


def token_sums(
    terms: DivergenceTerms,
    token_weights: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
    names: Sequence[str] | None = None,
) -> TokenSums:
    """Packs what a step needs from one micro batch.

    `loss` is summed with the token weights, every other metric over the tokens whose weight is not 0.

    Args:
        terms: of `linear_divergence_terms`, called with the same `token_weights`.
        token_weights: [T]; ones by default.
        rollout_logprobs: [T] the engine's log-probabilities of the targets, at the loss's temperature; with them comes
            `mismatch`, the mean of exp |log p - log p of the engine|, 1 where trainer and engine agree, and
            `logprob_gap`, the mean of |log p - log p of the engine| in nats, whose exponential is the geometric mean.
        names: what of it is wanted, `loss` first; by default all but what needs given answers.
    """
    mask = torch.ones_like(terms.per_token, dtype=torch.bool) if token_weights is None else token_weights != 0
    columns = {
        "reverse_kl": terms.reverse_kl,
        "forward_kl": terms.forward_kl,
        "student_entropy": terms.student_entropy,
        "teacher_entropy": terms.teacher_entropy,
        "top1_agreement": terms.top1_agreement,
    }
    columns |= _of_targets(terms) | _of_policy(terms)
    if rollout_logprobs is not None and terms.student_logprob is not None:
        difference = (terms.student_logprob.detach().double() - rollout_logprobs.double()).abs()
        columns[LOGPROB_GAP] = difference
        columns[MISMATCH] = difference.clamp(max=_LARGEST_DIFFERENCE).exp()
    if names is None:
        columns.pop(SFT_LOSS, None)
    else:
        columns = {name: columns[name] for name in names if name != "loss"}
    # Selection, not multiplication: a masked infinity must not become a NaN.
    per_token = torch.where(mask, torch.stack([column.double() for column in columns.values()]), 0)
    return TokenSums(
        loss_sum=terms.loss_sum,
        num_tokens=mask.sum(),
        sums=torch.cat([terms.loss_sum.detach().double().reshape(1), per_token.sum(dim=1)]),
        names=("loss", *columns),
    )


def add_sums(parts: Sequence[TokenSums]) -> TokenSums:
    """Joins the parts of a micro batch."""
    first, *others = parts
    if not others:
        return first
    return TokenSums(
        loss_sum=torch.stack([part.loss_sum for part in parts]).sum(),
        num_tokens=torch.stack([part.num_tokens for part in parts]).sum(),
        sums=torch.stack([part.sums for part in parts]).sum(0),
        names=first.names,
    )


def further_sums(terms: DivergenceTerms, token_weights: torch.Tensor, name: str, *, counts: bool = False) -> TokenSums:
    """Packs a pass of its own over some of a micro batch's tokens: its loss, and `name`, the sum of its divergence (not
    weighted) or, where it `counts`, the number of these tokens."""
    mask = token_weights != 0
    value = mask.sum().double() if counts else torch.where(mask, terms.divergence.double(), 0).sum()
    sums = torch.stack([terms.loss_sum.detach().double(), value])
    return TokenSums(terms.loss_sum, mask.sum(), sums, ("loss", name))


def joined_sums(main: TokenSums, further: Sequence[TokenSums]) -> TokenSums:
    """Adds passes of their own to that over all tokens."""
    for each in further:
        sums = torch.cat([main.sums[:1] + each.sums[:1], main.sums[1:], each.sums[1:]])
        main = TokenSums(main.loss_sum + each.loss_sum, main.num_tokens, sums, main.names + each.names[1:])
    return main


def _of_targets(terms: DivergenceTerms) -> dict[str, torch.Tensor]:
    """Computes the metrics of the targets, [T] each.

    The estimators of KL(p|q) from a sample of p: http://joschu.net/blog/kl-approx.html
    """
    if terms.student_logprob is None or terms.teacher_logprob is None:
        return {}
    r = (terms.student_logprob - terms.teacher_logprob).double()
    return {
        "nll": -terms.student_logprob,
        "teacher_nll": -terms.teacher_logprob,
        "k1": r,
        "k2": r.square() / 2,
        "k3": torch.expm1(-r) + r,
        "k1_gap": r - terms.reverse_kl,
    }


def _of_policy(terms: DivergenceTerms) -> dict[str, torch.Tensor]:
    if terms.policy is None:
        return {}
    policy = terms.policy
    values = (terms.divergence, policy.loss, policy.advantage, policy.ratio, policy.clipped)
    return dict(zip(POLICY_METRICS, values, strict=True)) | {SFT_LOSS: policy.likelihood}


def global_means(
    parts: Sequence[TokenSums],
    groups: Sequence[dist.ProcessGroup],
    device: torch.device,
    names: tuple[str, ...] = DIVERGENCE_METRICS,
) -> tuple[list[float], int]:
    """Computes the means of `names` over the tokens of all micro batches and ranks, and counts those tokens.

    Args:
        parts: this rank's micro batches; none on the pipeline stages that compute no loss.
        groups: one all-reduce of sums and count together over each, e.g. the ranks among which data and context are
            split, and then pipeline ranks. Together they must reach every token once.
        names: those of the parts, given because a rank without parts needs them too.
    """
    packed = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
    for part in parts:
        assert part.names == names, f"these metrics need `targets` or a policy term: {set(part.names) ^ set(names)}"
        packed += torch.cat([part.sums, part.num_tokens.double().reshape(1)])
    for group in groups:
        dist.all_reduce(packed, group=group)
    *sums, tokens = packed.tolist()
    return [value / max(tokens, 1.0) for value in sums], round(tokens)
