"""From logits to per-token terms and the gradient of the logits, over the vocabulary columns that one rank holds.

    statistics -> all-gather -> per-token sums -> all-reduce -> sampled-token terms -> gradient

The passes over the vocabulary are a backend's (`kernels`); here are their order, the two collectives between them, and
everything that has one number per token. Without a group and sampled-token terms a backend makes all passes in one go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from opd_megatron.losses.core.calls import GlobalSoftmaxStats, GradientCoefficients, LossInputs, PerTokenLoss
from opd_megatron.losses.core.ensemble import mean_logits, mean_probabilities
from opd_megatron.losses.core.validation import LossSpec
from opd_megatron.losses.kernels import choose_kernels
from opd_megatron.losses.kernels.base import LOG_ZERO, SUMS, Normalisers, Statistics
from opd_megatron.losses.policy import PolicyResult, policy_loss

# Sums beyond this were infinite (LOG_ZERO stands for log 0) and are reported so.
_INFINITE = 1e15
# Elements of the fp32 block that an ensemble is mixed into.
_ENSEMBLE_ELEMENTS = {"cpu": 2**19}
_ENSEMBLE_ELEMENTS_GPU = 2**26
# Log-probabilities closer than this are a tie where two ways of rounding meet.
_TIE = 1e-5


class VocabParallelLoss:
    """Computes one `LossSpec` for at most `tokens` tokens at a time."""

    def __init__(self, spec: LossSpec, tokens: int, device: torch.device, logits: Sequence[torch.dtype] = ()) -> None:
        self.spec = spec
        mixed = [spec.dtype] if spec.teachers > 1 else []
        elements = tokens * spec.columns
        self.kernels = choose_kernels(
            spec.divergence, spec.temperature, spec.dtype, device, [*logits, *mixed], elements
        )
        bounds = [self.kernels.block_elements]
        if spec.teachers > 1:
            bounds.append(_ENSEMBLE_ELEMENTS.get(device.type, _ENSEMBLE_ELEMENTS_GPU))
        limits = [bound // max(spec.columns, 1) for bound in bounds if bound is not None]
        self._block_rows = max(1, min([tokens, *limits]))

    def run(self, inputs: LossInputs) -> PerTokenLoss:
        """Computes every per-token term, and writes the gradient where `inputs.gradient` asks for it."""
        if self.spec.group is None and inputs.policy is None and self.spec.teachers == 1:
            terms = self._at_once(inputs)
        else:
            terms = self._in_stages(inputs)
        finite = torch.where(terms.sums.abs() > _INFINITE, terms.sums.sign() * math.inf, terms.sums)
        return PerTokenLoss(finite, terms.top1, terms.logprobs, terms.policy)

    # The whole vocabulary, one teacher: every block goes through all passes before the next.

    def _at_once(self, inputs: LossInputs) -> PerTokenLoss:
        divergence_coef = self._divergence_coef(inputs)
        at_targets = self._at_targets(inputs.targets, inputs.student, inputs.teachers[0])
        parts = []
        for rows in self._blocks(len(inputs.student)):
            out = None if inputs.gradient is None else inputs.gradient[rows]
            parts.append(
                self.kernels.fused(
                    inputs.student[rows], inputs.teachers[0][rows], divergence_coef[rows], out, inputs.with_metrics
                )
            )
        local = Statistics(*(torch.cat(field) for field in zip(*(statistics for statistics, _ in parts), strict=True)))
        logprobs = None
        if at_targets is not None:
            maxima = torch.stack([local.student_max, local.teacher_max])
            logprobs = at_targets - maxima - torch.stack([local.student_sum, local.teacher_sum]).log()
        top1 = (local.teacher_at_student_max >= local.teacher_max).to(self.spec.dtype)
        return PerTokenLoss(torch.cat([sums for _, sums in parts], dim=1), top1, logprobs)

    # Any group, any teachers: every pass over all blocks, so that a call makes two collectives whatever its size.

    def _in_stages(self, inputs: LossInputs) -> PerTokenLoss:
        blocks = self._blocks(len(inputs.student))
        local = torch.cat([self._statistics(inputs, rows) for rows in blocks], dim=1)
        merged = self._merge(local)
        packed = torch.cat([self._sums(inputs, rows, merged) for rows in blocks], dim=1)
        if self.spec.group is not None:
            dist.all_reduce(packed, group=self.spec.group)
        sums, above, at_targets = packed[: len(SUMS)], packed[len(SUMS)], packed[len(SUMS) + 1 :]
        logprobs = None if inputs.targets is None else at_targets
        policy = self._policy(inputs, at_targets)
        if inputs.gradient is not None and self.spec.columns:
            coefs = self._gradient_coefs(inputs, sums[-1], policy)
            for rows in blocks:
                self.kernels.gradient(
                    inputs.student[rows], self._teacher(inputs, rows, merged), self._normalisers(rows, merged),
                    coefs.divergence_coef[rows], coefs.softmax_coef[rows], inputs.gradient[rows],
                )  # fmt: skip
            self._write_targets(inputs, coefs, at_targets)
        return PerTokenLoss(sums, (above == 0).to(self.spec.dtype), logprobs, policy)

    def _statistics(self, inputs: LossInputs, rows: slice) -> torch.Tensor:
        """Computes [2 + 3 teacher matrices, R]: (max, sum) of the student, then (max, sum, at the student's max) of
        each."""
        student = inputs.student[rows]
        matrices = [teacher[rows] for teacher in inputs.teachers]
        if self.spec.teachers > 1 and self.spec.combine == "logit_mean":
            matrices = [mean_logits(matrices, self.spec.teacher_weights, self.spec.dtype)]
        if self.spec.columns == 0:
            empty = student.new_full((2 + 3 * len(matrices), len(student)), LOG_ZERO, dtype=self.spec.dtype)
            empty[1] = 0
            empty[3::3] = 0
            return empty
        of_each = [self.kernels.statistics(student, matrix) for matrix in matrices]
        fields = [*of_each[0][:2]]
        for statistics in of_each:
            fields += [statistics.teacher_max, statistics.teacher_sum, statistics.teacher_at_student_max]
        return torch.stack(fields)

    def _merge(self, local: torch.Tensor) -> GlobalSoftmaxStats:
        """Merges the ranks' statistics: the first of the two collectives."""
        group = self.spec.group
        ranks = 1 if group is None else dist.get_world_size(group)
        everyone = local.unsqueeze(0)
        if group is not None:
            gathered = local.new_empty(ranks * len(local), local.shape[1])
            dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
            everyone = gathered.view(ranks, *local.shape)
        teachers = everyone[:, 2:].unflatten(1, (-1, 3))
        maxima = torch.cat([everyone[:, :1], teachers[:, :, 0]], dim=1)
        sums = torch.cat([everyone[:, 1:2], teachers[:, :, 1]], dim=1)
        top = maxima.amax(dim=0)
        total = (sums * (maxima - top).exp()).sum(dim=0)
        first = maxima[:, 0].argmax(dim=0)  # the rank whose student maximum is the largest
        at = teachers[:, :, 2].gather(0, first.expand(1, teachers.shape[1], -1)).squeeze(0)
        return GlobalSoftmaxStats(top, total, at)

    def _teacher(self, inputs: LossInputs, rows: slice, merged: GlobalSoftmaxStats) -> torch.Tensor:
        """Returns the teacher's logits of a block; of several teachers, their mixture."""
        blocks = [teacher[rows] for teacher in inputs.teachers]
        weights, dtype = self.spec.teacher_weights, self.spec.dtype
        if self.spec.teachers == 1:
            return blocks[0]
        if self.spec.combine == "logit_mean":
            return mean_logits(blocks, weights, dtype)
        return mean_probabilities(
            blocks, weights, self.spec.temperature, merged.maxima[1:, rows], merged.log_sums[1:, rows], dtype
        )

    def _normalisers(self, rows: slice, merged: GlobalSoftmaxStats) -> Normalisers:
        student = merged.maxima[0, rows], merged.log_sums[0, rows]
        if self._mixes_probabilities:
            zero = torch.zeros_like(student[0])
            return Normalisers(*student, zero, zero)
        return Normalisers(*student, merged.maxima[1, rows], merged.log_sums[1, rows])

    @property
    def _mixes_probabilities(self) -> bool:
        return self.spec.teachers > 1 and self.spec.combine == "prob_mean"

    def _sums(self, inputs: LossInputs, rows: slice, merged: GlobalSoftmaxStats) -> torch.Tensor:
        """Computes this rank's part of `SUMS`, of how many columns the teacher prefers, and of the targets'
        logprobs."""
        student, normalisers = inputs.student[rows], self._normalisers(rows, merged)
        packed = normalisers.student_max.new_zeros(len(SUMS) + 3, len(student))
        if self.spec.columns == 0:
            return packed
        teacher = self._teacher(inputs, rows, merged)
        packed[: len(SUMS)] = self.kernels.sums(student, teacher, normalisers)
        packed[len(SUMS)] = self._preferred(teacher, rows, merged)
        at_targets = self._at_targets(None if inputs.targets is None else inputs.targets[rows], student, teacher)
        if at_targets is not None:
            student_max, student_log, teacher_max, teacher_log = normalisers
            logprobs = at_targets - torch.stack([student_max, teacher_max]) - torch.stack([student_log, teacher_log])
            assert inputs.targets is not None
            packed[len(SUMS) + 1 :] = torch.where(self._owned(inputs.targets[rows]), logprobs, 0)
        return packed

    def _preferred(self, teacher: torch.Tensor, rows: slice, merged: GlobalSoftmaxStats) -> torch.Tensor:
        """Counts the columns of this rank that the teacher ranks above the student's argmax."""
        if not self._mixes_probabilities:
            # The maximum is known: one rank says so.
            ahead = (merged.at[0, rows] < merged.maxima[1, rows]).to(self.spec.dtype)
            return ahead if self.spec.first_column == 0 else torch.zeros_like(ahead)
        log_weights = torch.tensor(self.spec.teacher_weights, device=teacher.device, dtype=teacher.dtype).log()
        log_q = merged.at[:, rows] - merged.maxima[1:, rows] - merged.log_sums[1:, rows] + log_weights.unsqueeze(-1)
        favourite = (log_q.logsumexp(0) + _TIE) * self.spec.temperature
        return (teacher > favourite.unsqueeze(-1)).sum(-1).to(self.spec.dtype)

    def _policy(self, inputs: LossInputs, logprobs: torch.Tensor) -> PolicyResult | None:
        """Computes the policy term from the targets' `logprobs` [2, T]."""
        if inputs.policy is None:
            return None
        mask = None if inputs.weights is None else inputs.weights != 0
        return policy_loss(inputs.policy, logprobs[0], logprobs[1], mask)

    def _gradient_coefs(
        self, inputs: LossInputs, weighted_grads: torch.Tensor, policy: PolicyResult | None
    ) -> GradientCoefficients:
        divergence_coef = self._divergence_coef(inputs)
        # A masked token's sums may be infinite.
        softmax_coef = torch.where(divergence_coef == 0, 0, divergence_coef * weighted_grads)
        if policy is None or inputs.policy is None:
            return GradientCoefficients(divergence_coef, softmax_coef, None)
        weights = torch.ones_like(divergence_coef) if inputs.weights is None else inputs.weights
        target_coef = torch.where(weights == 0, 0, weights * policy.dloss_dlogp) * (
            inputs.policy.coef / self.spec.temperature
        )
        return GradientCoefficients(divergence_coef, softmax_coef + target_coef, target_coef)

    def _write_targets(self, inputs: LossInputs, coefs: GradientCoefficients, logprobs: torch.Tensor) -> None:
        """Recomputes the gradient at the sampled tokens: target_coef (1 - p) would be lost in a rounded
        -target_coef p."""
        divergence_coef, softmax_coef, target_coef = coefs
        if target_coef is None:
            return
        assert inputs.targets is not None
        assert inputs.gradient is not None
        p, q, r = logprobs[0].exp(), logprobs[1].exp(), logprobs[0] - logprobs[1]
        weighted_grad = self.spec.divergence.weighted_grad(p, q, r, self.spec.divergence.parameter)
        entry = torch.where(divergence_coef == 0, 0, divergence_coef * weighted_grad) - softmax_coef * p + target_coef
        owned = self._owned(inputs.targets) & ((divergence_coef != 0) | (target_coef != 0))
        if not self.spec.columns:
            return
        # Of every row, so that nobody has to know how many are owned: the others get what they have.
        columns = (inputs.targets - self.spec.first_column).clamp(0, self.spec.columns - 1).unsqueeze(1)
        present = inputs.gradient.gather(1, columns).squeeze(1)
        values = torch.where(owned, entry.to(inputs.gradient.dtype), present)
        inputs.gradient.scatter_(1, columns, values.unsqueeze(1))

    # One number per token

    def _blocks(self, tokens: int) -> list[slice]:
        size = self._block_rows
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def _divergence_coef(self, inputs: LossInputs) -> torch.Tensor:
        """Computes [T]: the weight of the divergence's gradient with respect to the student's logits as they came
        in."""
        factor = self.spec.lambda_distill / self.spec.temperature
        if inputs.weights is None:
            return torch.full((len(inputs.student),), factor, dtype=self.spec.dtype, device=inputs.student.device)
        return inputs.weights * factor

    def _owned(self, targets: torch.Tensor) -> torch.Tensor:
        column = targets - self.spec.first_column
        return (column >= 0) & (column < self.spec.columns)

    def _at_targets(
        self, targets: torch.Tensor | None, student: torch.Tensor, teacher: torch.Tensor
    ) -> torch.Tensor | None:
        """Reads the logits [2, T] over the temperature at the targets (at some column where another rank owns them)."""
        if targets is None:
            return None
        column = (targets - self.spec.first_column).clamp(0, self.spec.columns - 1).unsqueeze(-1)
        chosen = [logits.gather(1, column).squeeze(-1).to(self.spec.dtype) for logits in (student, teacher)]
        return (torch.stack(chosen) / self.spec.temperature).clamp_(min=LOG_ZERO)
