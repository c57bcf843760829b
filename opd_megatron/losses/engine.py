"""The arithmetic behind both forms of the loss: normalise, sum, differentiate, over one rank's vocabulary columns.

    statistics (max, sum exp) -> all-gather -> per-token sums -> all-reduce -> gradient

Rows are worked on in blocks that stay near the cache, in buffers made once. Without a group a block goes through all
stages at once; with one, every stage runs over all blocks, so that a call makes two collectives whatever its size, and
blocks are read again instead of kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opd_megatron.losses.arguments import Objective
from opd_megatron.losses.divergences import Rows, Sums, kl_sums

# Elements of one fp32 buffer (there are six or more): tens of MiB on a CPU, launches worth their cost on a GPU.
_BLOCK_ELEMENTS = {"cpu": 2**21}
_BLOCK_ELEMENTS_GPU = 2**25

# Stands for log 0 so that 0 * log 0 is 0; sums beyond the limit were infinite and are reported so.
_LOG_ZERO = -1e30
_INFINITE = 1e24

_BASE_SUMS = (
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "student_logprob",
    "teacher_logprob",
)


@dataclass(frozen=True, slots=True)
class _Call:
    """The tensors of one `Engine.run`, or some rows of them."""

    student: torch.Tensor
    teachers: Sequence[torch.Tensor]
    targets: torch.Tensor | None
    gradient: torch.Tensor | None
    factor: torch.Tensor | None

    def rows(self, rows: slice) -> _Call:
        optional = [x if x is None else x[rows] for x in (self.targets, self.gradient, self.factor)]
        return _Call(self.student[rows], [teacher[rows] for teacher in self.teachers], *optional)


class Engine:
    """Runs one objective over chunks of at most `tokens` rows."""

    def __init__(self, objective: Objective, tokens: int, device: torch.device) -> None:
        self.objective = objective
        self.names = (*_BASE_SUMS, *objective.divergence.sum_names)
        self._normalisers = 1 + (len(objective.teacher_weights) if objective.combine == "prob_mean" else 1)
        limit = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_GPU)
        self._block_rows = max(1, min(tokens, limit // max(objective.columns, 1)))
        shape = (self._normalisers + 4, self._block_rows, objective.columns)
        self._buffers = torch.empty(shape, dtype=objective.dtype, device=device)

    def run(
        self,
        student: torch.Tensor,
        teachers: Sequence[torch.Tensor],
        targets: torch.Tensor | None = None,
        gradient: torch.Tensor | None = None,
        factor: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Per-token sums over the whole vocabulary, [len(names), T], the same on every rank of the group.

        Args:
            student: logits [T, columns], as are the `teachers`.
            targets: [T] global token ids, for the log-probability sums (0 without).
            gradient: [T, columns] to write d sum(factor * value) / d student to; may be `student` itself.
            factor: [T]; ones by default.
        """
        step = max(len(student), 1) if self.objective.group is not None else self._block_rows
        parts = []
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            call = _Call(student, teachers, targets, gradient, factor).rows(rows)
            parts.append(self._run(call))
        sums = torch.cat(parts, dim=1) if parts else self._buffers.new_zeros(len(self.names), 0)
        return torch.where(sums.abs() > _INFINITE, sums.sign() * math.inf, sums)

    def value(self, sums: torch.Tensor) -> torch.Tensor:
        """The objective per token, [T], from what `run` returned."""
        return self.objective.divergence.value(self._named(sums))

    def _named(self, sums: torch.Tensor) -> Sums:
        return dict(zip(self.names, sums, strict=True))

    def _run(self, call: _Call) -> torch.Tensor:
        tokens, size = len(call.student), self._block_rows
        blocks = [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
        again = len(blocks) > 1  # with one block the buffers still hold what the stage before left
        local = torch.cat([self._statistics(self._load(call.rows(block))) for block in blocks], dim=-1)
        shift = self._exchange_normalisers(local)
        parts = []
        for block in blocks:
            logits = self._load(call.rows(block), local[0, :, block]) if again else self._views(tokens)
            parts.append(self._sums(logits, shift[:, block], call.rows(block).targets))
        sums = torch.cat(parts, dim=1)
        if self.objective.group is not None:
            dist.all_reduce(sums, group=self.objective.group)
        if call.gradient is not None:
            for block in blocks:
                if again:
                    self._normalise(self._load(call.rows(block), local[0, :, block]), shift[:, block])
                    _to_ratio(self._rows(block.stop - block.start))
                self._gradient(call.rows(block), sums[:, block])
        return sums

    # Buffers: 0 student (log p, then r), 1 teacher (log q, then d), 2... further teachers of prob_mean, then p, q,
    # work and scratch.

    def _views(self, rows: int) -> list[torch.Tensor]:
        return [buffer[:rows] for buffer in self._buffers[: self._normalisers]]

    def _rows(self, rows: int) -> Rows:
        p, q, work, scratch = (buffer[:rows] for buffer in self._buffers[-4:])
        return Rows(p=p, q=q, r=self._buffers[0, :rows], d=self._buffers[1, :rows], work=work, scratch=scratch)

    def _load(self, call: _Call, local_max: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Copies a block's logits over the temperature into the buffers, minus this rank's maxima once known."""
        views = self._views(len(call.student))
        views[0].copy_(call.student)
        if self.objective.combine == "prob_mean":
            for view, logits in zip(views[1:], call.teachers, strict=True):
                view.copy_(logits)
        else:
            self._mean_logits(call.teachers, views[1])
        for index, view in enumerate(views):
            if self.objective.temperature != 1:
                view.div_(self.objective.temperature)
            view.clamp_(min=_LOG_ZERO)
            if local_max is not None:
                view.sub_(local_max[index].unsqueeze(-1))
        return views

    def _mean_logits(self, teachers: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        out.copy_(teachers[0])
        if len(teachers) == 1:
            return
        out.mul_(self.objective.teacher_weights[0])
        scratch = self._buffers[-1, : len(out)]
        for weight, logits in zip(self.objective.teacher_weights[1:], teachers[1:], strict=True):
            out.add_(scratch.copy_(logits), alpha=weight)

    def _statistics(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """(max, sum exp) of this rank's columns, [2, normalisers, R]; subtracts the max from the logits in place."""
        result = self._buffers.new_empty(2, len(logits), len(logits[0]))
        if self.objective.columns == 0:
            result[0], result[1] = -math.inf, 0
            return result
        scratch = self._buffers[-1, : len(logits[0])]
        for index, values in enumerate(logits):
            torch.amax(values, dim=-1, out=result[0, index])
            values.sub_(result[0, index].unsqueeze(-1))
            torch.sum(torch.exp(values, out=scratch), dim=-1, out=result[1, index])
        return result

    def _exchange_normalisers(self, local: torch.Tensor) -> torch.Tensor:
        """First collective: what to subtract from (logits - local max) to get log-probabilities, [normalisers, T]."""
        group = self.objective.group
        if group is None:
            return local[1].log()
        ranks = dist.get_world_size(group)
        gathered = local.new_empty(ranks * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local, group=group)
        maxima, sums = gathered.view(ranks, *local.shape).unbind(dim=1)
        top = maxima.amax(dim=0)
        total = (sums * (maxima - top).exp()).sum(dim=0)
        return top - local[0] + total.log()

    def _normalise(self, logits: list[torch.Tensor], shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log p and log q in buffers 0 and 1, p and q in theirs."""
        rows = self._rows(len(logits[0]))
        log_p, log_q = logits[0].sub_(shift[0].unsqueeze(-1)), logits[1]
        if self.objective.combine == "prob_mean":
            for index, weight in enumerate(self.objective.teacher_weights, start=1):
                logits[index].sub_(shift[index].unsqueeze(-1) - math.log(weight))
            for other in logits[2:]:
                torch.logaddexp(log_q, other, out=log_q)
        else:
            log_q.sub_(shift[1].unsqueeze(-1))
        torch.exp(log_p, out=rows.p)
        torch.exp(log_q, out=rows.q)
        return log_p, log_q

    def _sums(self, logits: list[torch.Tensor], shift: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        """This rank's part of every sum, [len(names), R]; leaves the block ready for `_gradient`."""
        count = len(logits[0])
        if self.objective.columns == 0:
            return self._buffers.new_zeros(len(self.names), count)
        log_p, log_q = self._normalise(logits, shift)
        rows = self._rows(count)
        entropies = [
            torch.mul(probability, log, out=rows.scratch).sum(-1).neg_()
            for probability, log in ((rows.p, log_p), (rows.q, log_q))
        ]
        logprobs = [self._at_targets(log, targets) for log in (log_p, log_q)]
        _to_ratio(rows)
        kls = kl_sums(rows)
        return torch.stack([*kls, *entropies, *logprobs, *self.objective.divergence.sums(rows)])

    def _at_targets(self, log: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        """log[i, targets[i]] where this rank holds the column, else 0."""
        if targets is None:
            return log.new_zeros(len(log))
        column = targets - self.objective.first_column
        held = (column >= 0) & (column < self.objective.columns)
        chosen = log.gather(1, column.clamp(0, self.objective.columns - 1).unsqueeze(-1)).squeeze(-1)
        return chosen.where(held, chosen.new_zeros(()))

    def _gradient(self, call: _Call, sums: torch.Tensor) -> None:
        assert call.gradient is not None
        gradient = self.objective.divergence.gradient(self._rows(len(call.student)), self._named(sums))
        # The factor and the chain rule through logits / temperature.
        if call.factor is not None:
            gradient.mul_((call.factor / self.objective.temperature).unsqueeze(-1))
        elif self.objective.temperature != 1:
            gradient.div_(self.objective.temperature)
        call.gradient.copy_(gradient)


def _to_ratio(rows: Rows) -> None:
    """Turns the buffers of log p and log q into r and d."""
    rows.r.sub_(rows.d)
    torch.sub(rows.q, rows.p, out=rows.d)
