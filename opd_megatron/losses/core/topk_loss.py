"""The loss for a top-k teacher: k entries of each token, and one tail that holds all other tokens, see `topk`.

We mask the top-k logits, sum over the rest, then add the top-k terms. We never compute 1 - mass, which would lose
digits. The two collectives are those of `VocabParallelLoss`, whatever k is.

With g = weighted_grad and S its sum over entries and tail, the gradient of an entry's column is g_j - p_j S, and that
of a column in the tail is its share p_j / p_tail of g_tail - p_tail S. The latter is computed as
g_tail sum_k p - p_tail sum_k g, which keeps its digits where nearly all of the student's mass is in the tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from opd_megatron.losses.core.calls import GlobalSoftmaxStats, GradientCoefficients, LossInputs, PerTokenLoss
from opd_megatron.losses.core.validation import LossSpec
from opd_megatron.losses.core.vocab_parallel_loss import VocabParallelLoss
from opd_megatron.losses.divergences import FORWARD_KL
from opd_megatron.losses.kernels import choose_kernels
from opd_megatron.losses.kernels.base import LOG_ZERO, SUMS, Normalisers
from opd_megatron.losses.topk import TopKEntries

_ENTROPY = SUMS.index("student_entropy")


@dataclass(frozen=True, slots=True)
class _OwnedEntries:
    """This rank's columns of the student, and the teacher's entries that lie in them."""

    tail: torch.Tensor
    """[T, n] the student's logits as they came in, -inf at entries."""
    tail_max: torch.Tensor
    tail_sum: torch.Tensor
    tail_entropy: torch.Tensor
    """[T]: of the softmax of `tail` at the temperature."""
    student: torch.Tensor
    """[T, k] the student's logits over the temperature at the entries; LOG_ZERO at those of other ranks."""
    teacher: torch.Tensor
    """[T, k] the teacher's log-probabilities, likewise."""
    places: tuple[torch.Tensor, ...]
    """Row and column in [T, n] of each entry that this rank owns, and"""
    entries: tuple[torch.Tensor, ...]
    """in [T, k]."""
    target: torch.Tensor
    """[T] the student's logit at the target (at some column where it is another rank's)."""


class TopKLoss(VocabParallelLoss):
    """Computes the loss of a top-k teacher, given as `LossInputs.entries`. See `VocabParallelLoss`."""

    def __init__(self, spec: LossSpec, tokens: int, device: torch.device, logits: Sequence[torch.dtype] = ()) -> None:
        # Over the vocabulary no divergence is computed, so it is the one that costs least.
        super().__init__(replace(spec, divergence=FORWARD_KL), tokens, device, logits)
        self.spec = spec
        self._events = choose_kernels(spec.divergence, 1.0, spec.dtype, device, logits, tokens * spec.columns)

    def _at_once(self, inputs: LossInputs) -> PerTokenLoss:
        return self._in_stages(inputs)

    def _in_stages(self, inputs: LossInputs) -> PerTokenLoss:
        entries = inputs.entries
        assert isinstance(entries, TopKEntries)
        owned = self._read(inputs, entries)
        best = entries.logprobs == entries.logprobs.amax(-1, keepdim=True)
        merged, of_rank = self._normalise(owned, best)
        packed = self._sums_of_rank(inputs, owned, merged, of_rank)
        if self.spec.group is not None:
            dist.all_reduce(packed, group=self.spec.group)
        sums, of_entries, at_target = packed[: len(SUMS)], packed[len(SUMS)], packed[len(SUMS) + 1]
        log_p = (merged.maxima[1] - merged.maxima[0]) + (merged.log_sums[1] - merged.log_sums[0])
        tail = self._tail_sums(log_p, entries)
        tail_grad = tail[-1] * of_entries - log_p.exp() * sums[-1]
        sums = sums + tail
        logprobs = None if inputs.targets is None else _with_teacher(entries, inputs.targets, at_target, log_p)
        policy = None if logprobs is None else self._policy(inputs, logprobs)
        if inputs.gradient is not None and self.spec.columns:
            coefs = self._gradient_coefs(inputs, sums[-1], policy)
            of_tail = torch.where(coefs.divergence_coef == 0, 0, coefs.divergence_coef * tail_grad)
            if coefs.target_coef is not None:
                of_tail = of_tail - coefs.target_coef * log_p.exp()
            self._write_tail(inputs.gradient, owned, merged, of_tail)
            self._write_entries(inputs.gradient, owned, merged, coefs)
            if logprobs is not None:
                self._write_targets(inputs, coefs, logprobs)
        return PerTokenLoss(sums, (merged.at[0] >= merged.maxima[0]).to(self.spec.dtype), logprobs, policy)

    # The student's statistics

    def _read(self, inputs: LossInputs, entries: TopKEntries) -> _OwnedEntries:
        """Makes the one pass over the vocabulary. Its copy of the logits takes the memory of `inputs.gradient`."""
        none = inputs.student.new_zeros(len(inputs.student), dtype=self.spec.dtype)
        inside = self._owned(entries.ids)
        where = inside.nonzero(as_tuple=True)
        places = where[0], entries.ids[where] - self.spec.first_column
        student, teacher = torch.full_like(entries.logprobs, LOG_ZERO), entries.logprobs.masked_fill(~inside, LOG_ZERO)
        if self.spec.columns == 0:
            return _OwnedEntries(inputs.student, none + LOG_ZERO, none, none, student, teacher, places, where, none)
        scaled = inputs.student[places].to(self.spec.dtype) / self.spec.temperature
        student[where] = scaled.clamp_(min=LOG_ZERO)
        at_targets = self._at_targets(inputs.targets, inputs.student, inputs.student)
        if inputs.gradient is None:
            tail = inputs.student.clone()
        else:
            tail = inputs.gradient if inputs.gradient is inputs.student else inputs.gradient.copy_(inputs.student)
        tail[places] = -math.inf
        parts = [self.kernels.fused(tail[rows], tail[rows], none[rows], None) for rows in self._blocks(len(tail))]
        maxima, totals = (torch.cat([statistics[i] for statistics, _ in parts]) for i in (0, 1))
        entropy = torch.cat([sums[_ENTROPY] for _, sums in parts])
        target = none if at_targets is None else at_targets[0]
        return _OwnedEntries(tail, maxima, totals, entropy, student, teacher, places, where, target)

    def _normalise(self, owned: _OwnedEntries, best: torch.Tensor) -> tuple[GlobalSoftmaxStats, torch.Tensor]:
        """Merges maxima and sums over the ranks: row 0 is the student, row 1 its tail, `at` its logit at the `best`
        entries.

        Also returns, of this rank's entries, [2, T]: the student's largest logit, and the sum of exp(logit - largest).
        """
        own = owned.student.amax(-1)
        of_entries = torch.where(owned.student > LOG_ZERO, (owned.student - own.unsqueeze(-1)).exp(), 0).sum(-1)
        top = torch.maximum(own, owned.tail_max)
        total = owned.tail_sum * (owned.tail_max - top).exp() + of_entries * (own - top).exp()
        at_best = torch.where(best, owned.student, LOG_ZERO).amax(-1)
        merged = self._merge(torch.stack([top, total, owned.tail_max, owned.tail_sum, at_best]))
        return merged, torch.stack([own, of_entries])

    # Sums over entries and tail

    def _sums_of_rank(
        self, inputs: LossInputs, owned: _OwnedEntries, merged: GlobalSoftmaxStats, of_rank: torch.Tensor
    ) -> torch.Tensor:
        """Computes [len(SUMS) + 2, T]: `SUMS` without the tail's, sum_k p, and the target's log-probability."""
        packed = torch.zeros_like(merged.maxima[:1]).repeat(len(SUMS) + 2, 1)
        if self.spec.columns == 0:
            return packed
        normalisers = self._of_entries(merged)
        for rows in self._event_blocks(owned):
            block = Normalisers(*(x[rows] for x in normalisers))
            packed[: len(SUMS), rows] = self._events.sums(owned.student[rows], owned.teacher[rows], block)
        top, log_sum = merged.maxima[0], merged.log_sums[0]
        packed[len(SUMS)] = of_rank[1] * (of_rank[0] - top - log_sum).exp()
        # The columns of this rank's tail hold the mass m together: their sum of -p log p is m (entropy - log m).
        log_m = (owned.tail_max - top) + (owned.tail_sum.log() - log_sum)
        packed[_ENTROPY] += log_m.exp() * (owned.tail_entropy - log_m)
        if inputs.targets is not None:
            packed[len(SUMS) + 1] = torch.where(self._owned(inputs.targets), owned.target - top - log_sum, 0)
        return packed

    def _tail_sums(self, log_p: torch.Tensor, entries: TopKEntries) -> torch.Tensor:
        """Computes `SUMS` of the tail, but for the student's entropy, which is exact column by column."""
        events = log_p.unsqueeze(-1), entries.log_tail.unsqueeze(-1)
        sums = self._events.sums(*events, Normalisers(*[torch.zeros_like(log_p)] * 4))
        sums = torch.where(entries.covered, 0, sums)
        sums[_ENTROPY] = 0
        return sums

    def _of_entries(self, merged: GlobalSoftmaxStats) -> Normalisers:
        zero = torch.zeros_like(merged.maxima[0])
        return Normalisers(merged.maxima[0], merged.log_sums[0], zero, zero)

    def _event_blocks(self, owned: _OwnedEntries) -> list[slice]:
        tokens, k = owned.student.shape
        bound = self._events.block_elements
        size = tokens if bound is None else max(1, bound // k)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    # The gradient

    def _write_tail(
        self, out: torch.Tensor, owned: _OwnedEntries, merged: GlobalSoftmaxStats, of_tail: torch.Tensor
    ) -> None:
        """Writes out = of_tail * p / p_tail."""
        share = merged.maxima[1], merged.log_sums[1]
        none = torch.zeros_like(of_tail)
        for rows in self._blocks(len(out)):
            normalisers = Normalisers(*(x[rows] for x in (*share, *share)))
            self.kernels.gradient(
                owned.tail[rows], owned.tail[rows], normalisers, none[rows], -of_tail[rows], out[rows]
            )

    def _write_entries(
        self, out: torch.Tensor, owned: _OwnedEntries, merged: GlobalSoftmaxStats, coefs: GradientCoefficients
    ) -> None:
        normalisers, gradient = self._of_entries(merged), torch.empty_like(owned.student)
        for rows in self._event_blocks(owned):
            block = Normalisers(*(x[rows] for x in normalisers))
            self._events.gradient(
                owned.student[rows], owned.teacher[rows], block,
                coefs.divergence_coef[rows], coefs.softmax_coef[rows], gradient[rows],
            )  # fmt: skip
        out[owned.places] = gradient[owned.entries].to(out.dtype)


def _with_teacher(
    entries: TopKEntries, targets: torch.Tensor, logprobs: torch.Tensor, log_p_tail: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities [2, T] of the targets, student's and teacher's.

    For a token outside the top k we assume that the teacher's tail is shaped like the student's.
    """
    sampled = entries.ids == targets.unsqueeze(-1)
    of_entry = torch.where(sampled, entries.logprobs, 0).sum(-1)
    of_tail = logprobs + (entries.log_tail - log_p_tail)
    return torch.stack([logprobs, torch.where(sampled.any(-1), of_entry, of_tail)])
