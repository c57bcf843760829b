"""The pass over chunks of tokens behind `linear_divergence`: logits, divergence and both gradients of each in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_megatron.losses.core.buffers import chunk_memory, empty_huge_pages, gradient_memory
from opd_megatron.losses.core.matmul import add_outer, times_head
from opd_megatron.losses.core.shared_loss import SharedLoss, row_logprobs
from opd_megatron.losses.core.topk_loss import TopKLoss
from opd_megatron.losses.core.validation import LossSpec
from opd_megatron.losses.core.vocab_parallel_loss import LossInputs, PerTokenLoss, VocabParallelLoss
from opd_megatron.losses.kernels.base import SUMS
from opd_megatron.losses.policy import PolicyResult, PolicyTerm
from opd_megatron.losses.shared import SharedRows, SharedTeacher
from opd_megatron.losses.topk import TopKEntries


class Projection(NamedTuple):
    """What a teacher's logits are made of."""

    hidden: torch.Tensor
    """[T, h]."""
    head: torch.Tensor
    """[v, h]: this rank's rows of the LM head."""
    gather_index: torch.Tensor | None = None
    """[T] int64, as the student's, of a teacher whose rows are dealt to the ranks otherwise than the student's."""


@dataclass(frozen=True, slots=True)
class FusedLinearArgs:
    """The arguments of one call that autograd does not track."""

    spec: LossSpec
    projections: Sequence[Projection]
    entries: TopKEntries | None
    """Those of a top-k teacher, which is then the only teacher."""
    shared: SharedTeacher | None
    """One of another vocabulary, which is then the only teacher."""
    token_weights: torch.Tensor | None
    targets: torch.Tensor | None
    policy: PolicyTerm | None
    chunks: Sequence[slice]
    gather_index: torch.Tensor | None
    """[T]: index of each token's row in all ranks' rows, with sequence parallelism."""
    with_metrics: bool
    hidden_grad: bool
    head_grad: bool
    main_grad: MainGrad | None = None


@dataclass(frozen=True, slots=True)
class MainGrad:
    """Where d head goes at once, in the place of a gradient that autograd hands out: the loss must be what backward
    begins at."""

    total: torch.Tensor
    """[v, h], fp32 or the head's own dtype: it is added to this."""
    announced: bool
    """Whether the head's parameter must still get a gradient, of any numbers, so that its hooks see that it is done.
    Not where it is an embedding too, which gets its own."""


class FusedLinearDivergence(torch.autograd.Function):
    """Keeps d hidden [T, h] and d head [v, h], made in forward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, args: FusedLinearArgs) -> tuple[torch.Tensor, ...]:
        chunked = _ChunkLoop(hidden, head, args)
        terms = chunked.run()
        sums, extra = terms.sums, torch.stack([terms.top1, *([] if terms.logprobs is None else terms.logprobs)])
        per_token = torch.zeros_like(terms.value)  # 0 times an infinite divergence is not a NaN
        if args.spec.lambda_distill:
            per_token = terms.value * args.spec.lambda_distill
        of_policy = per_token.new_zeros(0)
        if args.policy is not None and terms.policy is not None:
            of_policy = torch.stack(list(terms.policy))
            per_token = per_token + args.policy.coef * terms.policy.loss
        weighted = per_token
        if chunked.weights is not None:
            # A masked infinity is not a NaN.
            weighted = torch.where(chunked.weights == 0, 0, chunked.weights * per_token)
        ctx.group, ctx.gather_index, ctx.rows = args.spec.group, args.gather_index, len(hidden)
        ctx.signal = None
        head_gradient = None
        if args.main_grad is None:
            head_gradient = chunked.head_gradient_in(head.dtype)
        elif args.main_grad.announced:
            # The weights themselves: no memory, and nobody looks at it.
            ctx.signal = head.detach()
        ctx.save_for_backward(chunked.hidden_gradient, head_gradient)
        ctx.mark_non_differentiable(per_token, sums, extra, of_policy)
        return weighted.sum(), per_token, sums, extra, of_policy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            total = hidden_gradient.to(grad_loss.dtype) * grad_loss
            summed = _summed(total, ctx.group) if ctx.gather_index is None else _scattered(total, ctx)
            hidden_gradient = summed.to(hidden_gradient.dtype)
        if head_gradient is not None:
            head_gradient = _times(head_gradient, grad_loss)
        return hidden_gradient, head_gradient if ctx.signal is None else ctx.signal.detach(), None


def _times(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiplies, in place unless a later backward wants the gradient again (`retain_graph`): it is as large as the
    head. Skips even that pass where the factor is 1 and asking costs no synchronisation."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * factor
    return gradient if factor.device.type == "cpu" and factor.item() == 1 else gradient.mul_(factor)


def _summed(gradient: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sums d hidden [T, h] over the ranks, which each have it of their part of the vocabulary."""
    if group is not None and gradient.numel():
        dist.all_reduce(gradient, group=group)
    return gradient


def _scattered(gradient: torch.Tensor, ctx: Any) -> torch.Tensor:
    """Sums d hidden over the ranks and returns this rank's rows [R, h] (sequence parallelism), 0 for padding."""
    ranks = 1 if ctx.group is None else dist.get_world_size(ctx.group)
    everyones = gradient.new_zeros(ranks * ctx.rows, gradient.shape[1]).index_copy_(0, ctx.gather_index, gradient)
    if ctx.group is None or not gradient.numel():
        return everyones[: ctx.rows]
    mine = gradient.new_empty(ctx.rows, gradient.shape[1])
    dist.reduce_scatter_tensor(mine, everyones, group=ctx.group)
    return mine


def _gathered(hidden: torch.Tensor, index: torch.Tensor | None, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Gathers the hidden states [T, h] of all tokens where this rank holds only its rows."""
    hidden = hidden.detach()
    if index is None:
        return hidden
    if group is not None and len(index):
        everyones = hidden.new_empty(len(hidden) * dist.get_world_size(group), hidden.shape[1])
        dist.all_gather_into_tensor(everyones, hidden.contiguous(), group=group)
        hidden = everyones
    return hidden.index_select(0, index)


class _ChunkLoop:
    """One forward pass over chunks of tokens, with the buffers they share."""

    def __init__(self, hidden: torch.Tensor, head: torch.Tensor, args: FusedLinearArgs) -> None:
        self.args, group = args, args.spec.group
        self.hidden = _gathered(hidden, args.gather_index, group)
        self.columns = args.spec.columns
        self.head = head.detach()[: self.columns]
        self.teachers = [
            (
                _gathered(states, args.gather_index if own is None else own, group),
                weight.detach()[: self.columns],
            )
            for states, weight, own in args.projections
        ]
        self.tokens = max((chunk.stop - chunk.start for chunk in args.chunks), default=0)
        self.entries: TopKEntries | SharedRows | None = args.entries
        self.row_logprobs: torch.Tensor | None = None
        self.engine = self._engine(hidden.device)
        weights = args.token_weights
        self.weights = None if weights is None else weights.to(args.spec.dtype)
        self.hidden_gradient = torch.empty_like(self.hidden) if args.hidden_grad else None
        self.head_gradient = None
        if args.head_grad:
            self.head_gradient = self._new_head_gradient(head) if args.main_grad is None else args.main_grad.total

    def run(self) -> PerTokenLoss:
        if not len(self.hidden):
            return self._nothing()
        widths = [self.columns, *(len(head) for _, head in self.teachers)]
        buffers = [
            chunk_memory.empty((self.tokens, width), states.dtype, states.device)
            for states, width in zip(self._all_hidden(), widths, strict=True)
        ]
        parts = [self._chunk(rows, buffers) for rows in self.args.chunks]
        terms = parts[0] if len(parts) == 1 else _joined(parts)
        if self.args.shared is not None and self.row_logprobs is not None and terms.logprobs is not None:
            mine = terms.logprobs[0]
            logprobs = torch.stack([mine, self.args.shared.spread(mine, self.row_logprobs)])
            terms = replace(terms, logprobs=logprobs)
        return terms

    def _engine(self, device: torch.device) -> VocabParallelLoss:
        args, tokens = self.args, max(self.tokens, 1)
        if args.shared is not None:
            return self._shared_engine(args.shared, tokens, device)
        kind = VocabParallelLoss if args.entries is None else TopKLoss
        return kind(args.spec, tokens, device, [states.dtype for states in self._all_hidden()])

    def _shared_engine(self, teacher: SharedTeacher, tokens: int, device: torch.device) -> SharedLoss:
        """Scores the teacher's own tokens, then picks the row of each of the student's."""
        args, head = self.args, teacher.head.detach()
        states = _gathered(teacher.hidden, teacher.gather_index, args.spec.group)
        policy = args.policy
        if args.targets is not None:
            chunk = max(1, tokens * self.columns // max(1, len(head)))  # of as many logits as the student's
            self.row_logprobs = row_logprobs(states, head, teacher.targets, args.spec, chunk)
        spread = None
        if policy is not None and policy.rollout_logprobs is not None and self.row_logprobs is not None:
            spread = teacher.spread(policy.rollout_logprobs, self.row_logprobs)
        self.teachers = [(states.index_select(0, teacher.rows.clamp(min=0)), head)]
        self.entries = SharedRows(teacher.rows >= 0, teacher.columns, spread)
        return SharedLoss(args.spec, tokens, device, teacher.columns, len(head), teacher.conditional)

    def _all_hidden(self) -> list[torch.Tensor]:
        return [self.hidden, *(states for states, _ in self.teachers)]

    def _nothing(self) -> PerTokenLoss:
        empty = torch.empty(0, dtype=self.args.spec.dtype, device=self.hidden.device)
        policy = None if self.args.policy is None else PolicyResult(*[empty] * len(PolicyResult._fields))
        logprobs = None if self.args.targets is None else empty.expand(2, 0)
        return PerTokenLoss(empty.expand(len(SUMS), 0), empty, logprobs, policy)

    def _chunk(self, rows: slice, buffers: Sequence[torch.Tensor]) -> PerTokenLoss:
        hidden = self.hidden[rows]
        logits = [buffer[: len(hidden)] for buffer in buffers]
        torch.mm(hidden, self.head.t(), out=logits[0])
        for (states, head), out in zip(self.teachers, logits[1:], strict=True):
            torch.mm(states[rows], head.t(), out=out)
        args = self.args
        teachers = logits[1:]
        if not teachers and self.entries is None:
            teachers = logits[:1]  # without a teacher
        wanted = args.hidden_grad or args.head_grad
        terms = self.engine.run(
            LossInputs(
                student=logits[0],
                teachers=teachers,
                weights=None if self.weights is None else self.weights[rows],
                targets=None if args.targets is None else args.targets[rows],
                policy=None if args.policy is None else args.policy.rows(rows),
                gradient=logits[0] if wanted else None,
                with_metrics=args.with_metrics,
                entries=None if self.entries is None else self.entries.rows(rows),
            )
        )
        if self.hidden_gradient is not None:
            times_head(logits[0], self.head, out=self.hidden_gradient[rows])
        if self.head_gradient is not None:
            first = rows.start == 0 and args.main_grad is None
            add_outer(self.head_gradient[: self.columns], logits[0], hidden, first=first)
        return terms

    def _new_head_gradient(self, head: torch.Tensor) -> torch.Tensor:
        # Products of bf16 matrices are bf16, so a sum of two needs no wider storage; a longer one does.
        dtype = head.dtype if len(self.args.chunks) <= 2 else torch.promote_types(head.dtype, torch.float32)
        # A sum that is rounded at the end is not kept for the next call: both would then be there during backward.
        empty = gradient_memory.empty if dtype == head.dtype else empty_huge_pages
        gradient = empty(tuple(head.shape), dtype, head.device)
        gradient[self.columns if len(self.hidden) else 0 :].zero_()
        return gradient

    def head_gradient_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        if self.head_gradient is None or self.head_gradient.dtype == dtype:
            return self.head_gradient
        shape, device = tuple(self.head_gradient.shape), self.head_gradient.device
        return gradient_memory.empty(shape, dtype, device).copy_(self.head_gradient)


def _joined(parts: Sequence[PerTokenLoss]) -> PerTokenLoss:
    policy = None
    if parts[0].policy is not None:
        fields = zip(*(part.policy for part in parts if part.policy is not None), strict=True)
        policy = PolicyResult(*(torch.cat(field) for field in fields))
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return PerTokenLoss(
        torch.cat([part.sums for part in parts], dim=1),
        torch.cat([part.top1 for part in parts]),
        torch.cat(logprobs, dim=1) if logprobs else None,
        policy,
    )
