"""The engine for a top-k teacher: k entries of each token and one bucket that holds the rest, see `topk`.

The passes over the vocabulary read the student's tail alone: its logits with those at entries set to -inf. What they
leave out is added from the k entries, so that no mass is ever one minus another. The two collectives are those of
`VocabParallelLoss`, whatever k is.

With S = sum of pulls over entries and bucket, the gradient of an entry's column is pull_j - p_j S and that of a tail
column its share p_j / p_tail of pull_tail - p_tail S. The latter is computed as pull_tail sum_k p - p_tail sum_k pull,
which keeps its digits where nearly all of the student's mass is in the tail.
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
class _Held:
    """What this rank holds of the student, and of the teacher's entries those in its columns."""

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
    """Row and column in [T, n] of each entry held, and"""
    entries: tuple[torch.Tensor, ...]
    """in [T, k]."""
    target: torch.Tensor
    """[T] the student's logit at the target (at some column where it is another rank's)."""


class TopKLoss(VocabParallelLoss):
    """Runs calls whose teacher is their `entries`. See `VocabParallelLoss`."""

    def __init__(self, spec: LossSpec, tokens: int, device: torch.device, logits: Sequence[torch.dtype] = ()) -> None:
        # Over the vocabulary no divergence is computed, so it is the one that costs least.
        super().__init__(replace(spec, divergence=FORWARD_KL), tokens, device, logits)
        self.spec = spec
        self._events = choose_kernels(spec.divergence, 1.0, spec.dtype, device, logits, tokens * spec.columns)

    def _at_once(self, call: LossInputs) -> PerTokenLoss:
        return self._in_stages(call)

    def _in_stages(self, call: LossInputs) -> PerTokenLoss:
        entries = call.entries
        assert entries is not None
        held = self._read(call, entries)
        best = entries.logprobs == entries.logprobs.amax(-1, keepdim=True)
        merged, of_rank = self._normalise(held, best)
        packed = self._sums_of_rank(call, held, merged, of_rank)
        if self.spec.group is not None:
            dist.all_reduce(packed, group=self.spec.group)
        sums, of_entries, at_target = packed[: len(SUMS)], packed[len(SUMS)], packed[len(SUMS) + 1]
        log_p = (merged.maxima[1] - merged.maxima[0]) + (merged.log_sums[1] - merged.log_sums[0])
        bucket = self._bucket(log_p, entries)
        tail_pull = bucket[-1] * of_entries - log_p.exp() * sums[-1]
        sums = sums + bucket
        logprobs = None if call.targets is None else _with_teacher(entries, call.targets, at_target, log_p)
        policy = None if logprobs is None else self._policy(call, logprobs)
        if call.gradient is not None and self.spec.columns:
            factors = self._factors(call, sums[-1], policy)
            of_tail = torch.where(factors.scale == 0, 0, factors.scale * tail_pull)
            if factors.target_coef is not None:
                of_tail = of_tail - factors.target_coef * log_p.exp()
            self._write_tail(call.gradient, held, merged, of_tail)
            self._write_entries(call.gradient, held, merged, factors)
            if logprobs is not None:
                self._write_targets(call, factors, logprobs)
        return PerTokenLoss(sums, (merged.at[0] >= merged.maxima[0]).to(self.spec.dtype), logprobs, policy)

    # The student's statistics

    def _read(self, call: LossInputs, entries: TopKEntries) -> _Held:
        """The pass over the vocabulary. Its copy of the logits takes the memory of `call.gradient`."""
        none = call.student.new_zeros(len(call.student), dtype=self.spec.dtype)
        inside = self._held(entries.ids)
        where = inside.nonzero(as_tuple=True)
        places = where[0], entries.ids[where] - self.spec.first_column
        student, teacher = torch.full_like(entries.logprobs, LOG_ZERO), entries.logprobs.masked_fill(~inside, LOG_ZERO)
        if self.spec.columns == 0:
            return _Held(call.student, none + LOG_ZERO, none, none, student, teacher, places, where, none)
        scaled = call.student[places].to(self.spec.dtype) / self.spec.temperature
        student[where] = scaled.clamp_(min=LOG_ZERO)
        at_targets = self._at_targets(call.targets, call.student, call.student)
        if call.gradient is None:
            tail = call.student.clone()
        else:
            tail = call.gradient if call.gradient is call.student else call.gradient.copy_(call.student)
        tail[places] = -math.inf
        parts = [self.kernels.fused(tail[rows], tail[rows], none[rows], None) for rows in self._blocks(len(tail))]
        maxima, totals = (torch.cat([statistics[i] for statistics, _ in parts]) for i in (0, 1))
        entropy = torch.cat([sums[_ENTROPY] for _, sums in parts])
        target = none if at_targets is None else at_targets[0]
        return _Held(tail, maxima, totals, entropy, student, teacher, places, where, target)

    def _normalise(self, held: _Held, best: torch.Tensor) -> tuple[GlobalSoftmaxStats, torch.Tensor]:
        """Of the whole vocabulary: row 0 is the student, row 1 its tail, `at` its logit at the `best` entries.

        And of this rank's entries, [2, T]: the student's largest logit, and the sum of exp(logit - largest).
        """
        own = held.student.amax(-1)
        of_entries = torch.where(held.student > LOG_ZERO, (held.student - own.unsqueeze(-1)).exp(), 0).sum(-1)
        top = torch.maximum(own, held.tail_max)
        total = held.tail_sum * (held.tail_max - top).exp() + of_entries * (own - top).exp()
        at_best = torch.where(best, held.student, LOG_ZERO).amax(-1)
        merged = self._merge(torch.stack([top, total, held.tail_max, held.tail_sum, at_best]))
        return merged, torch.stack([own, of_entries])

    # Sums over entries and bucket

    def _sums_of_rank(
        self, call: LossInputs, held: _Held, merged: GlobalSoftmaxStats, of_rank: torch.Tensor
    ) -> torch.Tensor:
        """[len(SUMS) + 2, T]: `SUMS` but for the bucket, sum_k p, and the target's log-probability."""
        packed = torch.zeros_like(merged.maxima[:1]).repeat(len(SUMS) + 2, 1)
        if self.spec.columns == 0:
            return packed
        normalisers = self._of_entries(merged)
        for rows in self._event_blocks(held):
            block = Normalisers(*(x[rows] for x in normalisers))
            packed[: len(SUMS), rows] = self._events.sums(held.student[rows], held.teacher[rows], block)
        top, log_sum = merged.maxima[0], merged.log_sums[0]
        packed[len(SUMS)] = of_rank[1] * (of_rank[0] - top - log_sum).exp()
        # The columns of this rank's tail hold the mass m together: their sum of -p log p is m (entropy - log m).
        log_m = (held.tail_max - top) + (held.tail_sum.log() - log_sum)
        packed[_ENTROPY] += log_m.exp() * (held.tail_entropy - log_m)
        if call.targets is not None:
            packed[len(SUMS) + 1] = torch.where(self._held(call.targets), held.target - top - log_sum, 0)
        return packed

    def _bucket(self, log_p: torch.Tensor, entries: TopKEntries) -> torch.Tensor:
        """`SUMS` of the bucket, but for the student's entropy, which is exact column by column."""
        events = log_p.unsqueeze(-1), entries.log_tail.unsqueeze(-1)
        sums = self._events.sums(*events, Normalisers(*[torch.zeros_like(log_p)] * 4))
        sums = torch.where(entries.covered, 0, sums)
        sums[_ENTROPY] = 0
        return sums

    def _of_entries(self, merged: GlobalSoftmaxStats) -> Normalisers:
        zero = torch.zeros_like(merged.maxima[0])
        return Normalisers(merged.maxima[0], merged.log_sums[0], zero, zero)

    def _event_blocks(self, held: _Held) -> list[slice]:
        tokens, k = held.student.shape
        bound = self._events.block_elements
        size = tokens if bound is None else max(1, bound // k)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    # The gradient

    def _write_tail(self, out: torch.Tensor, held: _Held, merged: GlobalSoftmaxStats, of_tail: torch.Tensor) -> None:
        """out = of_tail * p / p_tail."""
        share = merged.maxima[1], merged.log_sums[1]
        none = torch.zeros_like(of_tail)
        for rows in self._blocks(len(out)):
            normalisers = Normalisers(*(x[rows] for x in (*share, *share)))
            self.kernels.gradient(held.tail[rows], held.tail[rows], normalisers, none[rows], -of_tail[rows], out[rows])

    def _write_entries(
        self, out: torch.Tensor, held: _Held, merged: GlobalSoftmaxStats, factors: GradientCoefficients
    ) -> None:
        normalisers, gradient = self._of_entries(merged), torch.empty_like(held.student)
        for rows in self._event_blocks(held):
            block = Normalisers(*(x[rows] for x in normalisers))
            self._events.gradient(
                held.student[rows], held.teacher[rows], block, factors.scale[rows], factors.shared[rows], gradient[rows]
            )
        out[held.places] = gradient[held.entries].to(out.dtype)


def _with_teacher(
    entries: TopKEntries, targets: torch.Tensor, logprobs: torch.Tensor, log_p_tail: torch.Tensor
) -> torch.Tensor:
    """[2, T]: the student's log-probabilities of the targets and the teacher's, in the tail by the student's shape."""
    sampled = entries.ids == targets.unsqueeze(-1)
    of_entry = torch.where(sampled, entries.logprobs, 0).sum(-1)
    of_tail = logprobs + (entries.log_tail - log_p_tail)
    return torch.stack([logprobs, torch.where(sampled.any(-1), of_entry, of_tail)])
