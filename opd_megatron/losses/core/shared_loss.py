"""The loss for a teacher of another vocabulary: events are the tokens that both have and one of all others, see
`shared`.

With g = weighted_grad and S its sum over the events, the gradient of a shared column is g_k - p_k S, and that of a
column in the rest is its share p_j / p_rest of g_rest - p_rest S. Two collectives a chunk, as in `VocabParallelLoss`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.losses.core.calls import LossInputs, PerTokenLoss
from opd_megatron.losses.core.validation import LossSpec
from opd_megatron.losses.core.vocab_parallel_loss import VocabParallelLoss
from opd_megatron.losses.kernels.base import LOG_ZERO, SUMS
from opd_megatron.losses.policy import PolicyResult, policy_loss
from opd_megatron.losses.shared import SharedRows

_ROWS, _LOCAL = 4, 8
# Elements of a block of logits, of which some ten copies are made.
_BLOCK_ELEMENTS = {"cpu": 2**21}
_BLOCK_ELEMENTS_GPU = 2**26


@dataclass(frozen=True, slots=True)
class _Block:
    """This rank's logits over the temperature, [R, ..], of some tokens."""

    student: torch.Tensor
    """[R, columns] of all columns."""
    shared: torch.Tensor
    """[R, n] of those that the teacher has."""
    rest: torch.Tensor
    """[R, columns] -inf there."""
    teacher: torch.Tensor
    """[R, n]"""
    teacher_rest: torch.Tensor
    """[R, m]"""


class SharedLoss(VocabParallelLoss):
    """Computes the loss of a `SharedTeacher`, whose `SharedRows` are `LossInputs.entries` and whose logits [T, n + m]
    are `LossInputs.teachers[0]`. See `VocabParallelLoss`."""

    def __init__(
        self, spec: LossSpec, tokens: int, device: torch.device, columns: torch.Tensor, width: int, conditional: bool
    ) -> None:
        """`columns`, `conditional`: of the `SharedTeacher`. `width`: of its head on this rank."""
        self.spec, self._columns, self._conditional = spec, columns, conditional
        self._others = torch.ones(spec.columns, dtype=torch.bool, device=device)
        self._others[columns] = False
        bound = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_GPU)
        self._block_rows = max(1, min(tokens, bound // max(spec.columns + width, 1)))

    def _at_once(self, inputs: LossInputs) -> PerTokenLoss:
        return self._in_stages(inputs)

    def _in_stages(self, inputs: LossInputs) -> PerTokenLoss:
        rows = inputs.entries
        assert isinstance(rows, SharedRows)
        blocks = self._blocks(len(inputs.student))
        stats = self._merged(torch.cat([self._of_block(self._read(inputs, block)) for block in blocks], dim=1))
        packed = torch.cat([self._local_sums(inputs, block, stats[:, block]) for block in blocks], dim=1)
        if self.spec.group is not None:
            dist.all_reduce(packed, group=self.spec.group)
        sums, of_target = packed[: len(SUMS)], packed[len(SUMS)]
        if not self._conditional:
            sums = sums + self._of_rest(stats)
        named = dict(zip(SUMS, sums, strict=True))
        none = torch.zeros_like(of_target)
        for name in SUMS:
            if name != "student_entropy":
                named[name] = torch.where(rows.met, named[name], none)
        sums = torch.stack([named[name] for name in SUMS])
        logprobs = policy = None
        if inputs.targets is not None:
            logprobs = torch.stack([of_target, of_target if rows.logprobs is None else rows.logprobs])
            policy = self._policy(inputs, logprobs)
        if inputs.gradient is not None and self.spec.columns:
            self._write(inputs, rows, stats, sums[-1], policy)
        agree = rows.met & (stats[_ROWS + 1] >= stats[_ROWS + 2]) & (stats[_ROWS] >= stats[_ROWS + 3])
        return PerTokenLoss(sums, agree.to(self.spec.dtype), logprobs, policy)

    def _read(self, inputs: LossInputs, block: slice) -> _Block:
        dtype, temperature, n = self.spec.dtype, self.spec.temperature, len(self._columns)
        student = (inputs.student[block].to(dtype) / temperature).clamp_(min=LOG_ZERO)
        teacher = (inputs.teachers[0][block].to(dtype) / temperature).clamp_(min=LOG_ZERO)
        rest = student.masked_fill(~self._others, LOG_ZERO)
        return _Block(student, student[:, self._columns], rest, teacher[:, :n], teacher[:, n:])

    # One number per token

    @staticmethod
    def _of_block(block: _Block) -> torch.Tensor:
        """Computes [8, R]: log sums of the student's shared and other columns and of the teacher's; the student's
        largest shared logit, the teacher's there, the teacher's largest, and the student's largest other one."""
        sums = [_log_sum(part) for part in (block.shared, block.rest, block.teacher, block.teacher_rest)]
        none = sums[0].new_full(sums[0].shape, LOG_ZERO)
        best, at_best = none, none
        if block.shared.shape[1]:
            best, places = block.shared.max(-1)
            at_best = block.teacher.gather(1, places.unsqueeze(-1)).squeeze(-1)
        largest = torch.maximum(_largest(block.teacher, none), _largest(block.teacher_rest, none))
        return torch.stack([*sums, best, at_best, largest, _largest(block.rest, none)])

    def _merged(self, local: torch.Tensor) -> torch.Tensor:
        """Merges the ranks' statistics: the first of the two collectives."""
        group = self.spec.group
        if group is None:
            return local
        everyone = local.new_empty(dist.get_world_size(group) * _LOCAL, local.shape[1])
        dist.all_gather_into_tensor(everyone, local.contiguous(), group=group)
        ranks = everyone.view(-1, *local.shape)
        first = ranks[:, _ROWS].argmax(0, keepdim=True)
        merged = ranks.amax(0)
        merged[:_ROWS] = ranks[:, :_ROWS].logsumexp(0)
        merged[_ROWS + 1] = ranks[:, _ROWS + 1].gather(0, first).squeeze(0)
        return merged

    @staticmethod
    def _normalised(stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log of the student's whole sum and of the teacher's, [R] each."""
        return torch.logaddexp(stats[0], stats[1]), torch.logaddexp(stats[2], stats[3])

    def _of_events(self, stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same over the events that are compared."""
        return (stats[0], stats[2]) if self._conditional else self._normalised(stats)

    def _local_sums(self, inputs: LossInputs, rows: slice, stats: torch.Tensor) -> torch.Tensor:
        """Computes [len(SUMS) + 1, R]: this rank's part of `SUMS` without the rest's event, and of the targets'
        log-probabilities. Entropies are of the whole vocabularies."""
        block, (log_z, log_z_teacher) = self._read(inputs, rows), self._normalised(stats)
        packed = log_z.new_zeros(len(SUMS) + 1, len(log_z))
        named = dict(zip(SUMS, packed, strict=False))
        of_student, of_teacher = (each.unsqueeze(-1) for each in self._of_events(stats))
        self._add_event(named, block.shared - of_student, block.teacher - of_teacher)
        named["student_entropy"].copy_(_entropy(block.student - log_z.unsqueeze(-1)))
        for part in (block.teacher, block.teacher_rest):
            named["teacher_entropy"].add_(_entropy(part - log_z_teacher.unsqueeze(-1)))
        if inputs.targets is not None and self.spec.columns:
            targets = inputs.targets[rows]
            column = (targets - self.spec.first_column).clamp(0, self.spec.columns - 1).unsqueeze(-1)
            packed[-1] = torch.where(self._owned(targets), block.student.gather(1, column).squeeze(-1) - log_z, 0)
        return packed

    def _add_event(self, named: dict[str, torch.Tensor], log_p: torch.Tensor, log_q: torch.Tensor) -> None:
        """Writes the sums over the last dimension of events of the given log-probabilities."""
        p, q, r = log_p.exp(), log_q.exp(), log_p - log_q
        divergence = self.spec.divergence
        named["reverse_kl"].copy_((p * r).sum(-1))
        named["forward_kl"].copy_(-(q * r).sum(-1))
        named["value"].copy_(divergence.value(p, q, r, divergence.parameter).sum(-1))
        named["weighted_grad"].copy_(divergence.weighted_grad(p, q, r, divergence.parameter).sum(-1))

    def _of_rest(self, stats: torch.Tensor) -> torch.Tensor:
        """`SUMS` of the rest's event alone, the same on every rank."""
        log_z, log_z_teacher = self._normalised(stats)
        log_p, log_q = _log_of(stats[1], log_z), _log_of(stats[3], log_z_teacher)
        sums = log_z.new_zeros(len(SUMS), len(log_z))
        self._add_event(dict(zip(SUMS, sums, strict=True)), log_p.unsqueeze(-1), log_q.unsqueeze(-1))
        return sums

    def _policy(self, inputs: LossInputs, logprobs: torch.Tensor) -> PolicyResult | None:
        if inputs.policy is None:
            return None
        mask = None if inputs.weights is None else inputs.weights != 0
        return policy_loss(inputs.policy, logprobs[0], logprobs[1].to(logprobs.dtype), mask)

    # The gradient

    def _write(
        self,
        inputs: LossInputs,
        rows: SharedRows,
        stats: torch.Tensor,
        grads: torch.Tensor,
        policy: PolicyResult | None,
    ) -> None:
        """Writes d sum(weights * loss) / d student into `inputs.gradient`."""
        assert inputs.gradient is not None
        coefs = self._gradient_coefs(inputs, grads, policy)
        of_divergence = torch.where(rows.met, coefs.divergence_coef, torch.zeros_like(coefs.divergence_coef))
        divergence = self.spec.divergence
        log_z, log_z_teacher = self._normalised(stats)
        log_rest, log_rest_teacher = _log_of(stats[1], log_z), _log_of(stats[3], log_z_teacher)
        of_rest = divergence.weighted_grad(
            log_rest.exp(), log_rest_teacher.exp(), log_rest - log_rest_teacher, divergence.parameter
        )
        of_student, of_teacher = self._of_events(stats)
        for block in self._blocks(len(inputs.student)):
            found, coef = self._read(inputs, block), of_divergence[block].unsqueeze(-1)
            log_p = found.shared - of_student[block].unsqueeze(-1)
            log_q = found.teacher - of_teacher[block].unsqueeze(-1)
            p = log_p.exp()
            # Of an event, and of a column of the rest its share: weighted_grad - p S.
            weighted = divergence.weighted_grad(p, log_q.exp(), log_p - log_q, divergence.parameter)
            gradient = (found.rest - stats[1, block].unsqueeze(-1)).exp()
            gradient *= (of_rest - log_rest.exp() * grads)[block].unsqueeze(-1) * (0.0 if self._conditional else 1.0)
            gradient[:, self._columns] = weighted - p * grads[block].unsqueeze(-1)
            gradient = torch.where(coef == 0, 0, gradient * coef)
            if coefs.target_coef is not None and inputs.targets is not None:
                of_target = coefs.target_coef[block]
                gradient -= of_target.unsqueeze(-1) * (found.student - log_z[block].unsqueeze(-1)).exp()
                self._add_targets(gradient, inputs.targets[block], of_target)
            inputs.gradient[block] = gradient.to(inputs.gradient.dtype)

    def _add_targets(self, gradient: torch.Tensor, targets: torch.Tensor, coef: torch.Tensor) -> None:
        owned = self._owned(targets).nonzero().squeeze(-1)
        gradient[owned, targets[owned] - self.spec.first_column] += coef[owned].to(gradient.dtype)


def _log_sum(logits: torch.Tensor) -> torch.Tensor:
    if not logits.shape[1]:
        return logits.new_full((len(logits),), LOG_ZERO)
    return logits.logsumexp(-1).clamp_(min=LOG_ZERO)


def _log_of(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Log of a share, at most 0: rounding may say more where it is everything."""
    return (part - whole).clamp(max=0.0)


def _largest(logits: torch.Tensor, none: torch.Tensor) -> torch.Tensor:
    return logits.amax(-1) if logits.shape[1] else none


def _entropy(log_p: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0).sum(-1)


@torch.no_grad()
def row_logprobs(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, spec: LossSpec, chunk: int
) -> torch.Tensor:
    """[T'] log-probabilities of a model's own tokens, its head sharded over `spec.group` in any way.

    Args:
        hidden: [T', h].
        head: [w, h] this rank's rows.
        targets: [T'] row of `head` of each token; -1 where it is another rank's.
        chunk: tokens whose logits exist at a time.
    """
    parts = []
    for start in range(0, len(hidden), chunk):
        logits = (hidden[start : start + chunk] @ head.t()).to(spec.dtype) / spec.temperature
        places = targets[start : start + chunk]
        at = torch.zeros_like(places, dtype=spec.dtype)
        if len(head):
            chosen = logits.gather(1, places.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            at = torch.where(places >= 0, chosen, at)
        parts.append(torch.stack([_log_sum(logits), at]))
    if not parts:
        return torch.empty(0, dtype=spec.dtype, device=hidden.device)
    log_sum, at = torch.cat(parts, dim=1)
    if spec.group is not None:
        everyone = log_sum.new_empty(dist.get_world_size(spec.group) * len(log_sum))
        dist.all_gather_into_tensor(everyone, log_sum.contiguous(), group=spec.group)
        log_sum = everyone.view(-1, len(log_sum)).logsumexp(0)
        at = at.contiguous()
        dist.all_reduce(at, group=spec.group)
    return at - log_sum
