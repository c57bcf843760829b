"""The divergence from hidden states and LM heads: logits exist for one chunk of tokens at a time.

Loss, d hidden and d head are all made in the forward pass, chunk by chunk, because the weight of every token in the
loss is known there. Nothing of size [tokens, vocabulary] is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_megatron.errors import ConfigError
from opd_megatron.losses.arguments import (
    Choices,
    Objective,
    check_matrix,
    check_per_token,
    check_projection,
    check_targets,
    make_objective,
)
from opd_megatron.losses.chunks import chunk_bounds
from opd_megatron.losses.engine import Call, Engine, Terms
from opd_megatron.losses.kernels.base import SUMS
from opd_megatron.losses.policy import PolicyResult, PolicyTerm, check_policy
from opd_megatron.losses.products import add_outer, chunk_memory, large_empty, times_head
from opd_megatron.losses.topk import Entries, TopKTeacher, check_entries, split_topk
from opd_megatron.losses.topk_engine import TopKEngine

Projection = tuple[torch.Tensor, torch.Tensor]
"""Hidden states [T, h] and this rank's rows of the LM head [v, h]."""


@dataclass(frozen=True)
class DivergenceTerms:
    """What one pass yields. Only `loss_sum` is differentiable; the rest is detached, [T] each, in nats.

    All of it is at the objective's temperature: log-probabilities and entropies are those of softmax(logits / T), so
    an evaluation that wants the model's own negative log-likelihood calls with `temperature=1`.
    """

    loss_sum: torch.Tensor
    """Scalar: sum over tokens of weight times loss."""
    per_token: torch.Tensor
    """Loss of each token, not weighted: lambda_distill times the divergence plus the policy term."""
    divergence: torch.Tensor
    reverse_kl: torch.Tensor
    forward_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor
    """1 where both models prefer the same token, else 0."""
    student_logprob: torch.Tensor | None = None
    """Of `targets`; None without."""
    teacher_logprob: torch.Tensor | None = None
    policy: PolicyResult | None = None
    """Of the policy term; None without."""


def linear_divergence(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teachers: Sequence[Projection] | Sequence[TopKTeacher],
    *,
    type: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    lambda_coef: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    teacher_weights: Sequence[float] | None = None,
    combine: str = "logit_mean",
    token_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    sequence_parallel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_sum scalar, per_token [T] detached) of `linear_divergence_terms`."""
    terms = linear_divergence_terms(
        student_hidden, student_head, teachers, type=type, beta=beta, alpha=alpha, lambda_coef=lambda_coef,
        temperature=temperature, vocab_size=vocab_size, group=group, teacher_weights=teacher_weights, combine=combine,
        token_weights=token_weights, chunk_tokens=chunk_tokens, sequence_parallel=sequence_parallel, described=False,
    )  # fmt: skip
    return terms.loss_sum, terms.per_token


def linear_divergence_terms(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teachers: Sequence[Projection] | Sequence[TopKTeacher],
    *,
    type: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    lambda_coef: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    teacher_weights: Sequence[float] | None = None,
    combine: str = "logit_mean",
    lambda_distill: float = 1.0,
    token_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    targets: torch.Tensor | None = None,
    policy: PolicyTerm | None = None,
    sequence_parallel: bool = False,
    described: bool = True,
) -> DivergenceTerms:
    """Exact divergence between a student and its teachers from hidden states, with two collectives for each chunk.

    Rank r of the group holds rows [r v, (r + 1) v) of every head and the same hidden states as the other ranks. The
    gradient of `student_hidden` is the full one on every rank (summed over the group in backward); that of
    `student_head` is this rank's rows. Teachers are constants. `type` to `combine`: see `vocab_parallel_divergence`.

    Args:
        student_hidden: [T, h]; differentiable. T may be 0.
        student_head: [v, h]; differentiable, and may be a tied embedding.
        teachers: (hidden [T, h_i], head [v, h_i]) of each; or one `TopKTeacher`, whose divergence and metrics are those
            of its entries and one bucket that holds the rest (`student_entropy` is of the whole vocabulary, and
            `teacher_logprob` of a token without an entry its share of the bucket by the student's shape).
        lambda_distill: weight of the divergence in the loss.
        token_weights: [T]; ones by default, 0 masks a token.
        chunk_tokens: tokens whose logits exist at a time; must agree across the group. Chosen by memory by default.
        targets: [T] int64 global token ids whose log-probabilities are wanted.
        policy: a policy-gradient term on the `targets`, in the same pass; with `level="sequence"` a chunk grows until
            it holds whole sequences.
        sequence_parallel: hidden states, the teachers' too, are this rank's [T / ranks, h] of all T tokens; everything
            else is still [T]. Gathers them, and reduce-scatters the gradient in backward.
        described: False leaves both KLs and both entropies of the result at 0 where that saves time.

    Raises:
        ConfigError: (a ValueError) arguments that are out of range or do not fit together, before any collective.
    """
    choices = Choices(
        type, beta, alpha, lambda_coef, temperature, vocab_size, group, teacher_weights, combine, lambda_distill
    )
    projections, topk = split_topk(teachers)
    _check_tensors(student_hidden, student_head, projections)
    # The entries of a top-k teacher are of all columns, whatever the student's.
    heads = [student_head, *([student_head] if topk is not None else [head for _, head in projections])]
    objective = make_objective(choices, widths=[len(head) for head in heads], dtypes=[head.dtype for head in heads])
    shards = dist.get_world_size(objective.group) if sequence_parallel and objective.group is not None else 1
    tokens = len(student_hidden) * shards
    rows = student_hidden.new_empty(tokens, 0)
    check_per_token("token_weights", token_weights, rows)
    check_targets(targets, rows, objective.vocab_size)
    entries = None if topk is None else check_entries(topk, rows, objective)
    if policy is not None:
        check_policy(policy, rows)
        if targets is None:
            raise ConfigError("targets is missing but the policy term is about sampled tokens: pass their ids")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens={chunk_tokens} must be at least 1: leave it out to have it chosen")
    tracked = torch.is_grad_enabled()
    plan = _Plan(
        objective, projections, entries, token_weights, targets, policy,
        chunks=chunk_bounds(tokens, student_head, chunk_tokens, policy), shards=shards, described=described,
        hidden_grad=tracked and student_hidden.requires_grad, head_grad=tracked and student_head.requires_grad,
    )  # fmt: skip
    loss_sum, per_token, sums, extra, of_policy = _FromHidden.apply(student_hidden, student_head, plan)
    named = dict(zip(SUMS, sums, strict=True))
    return DivergenceTerms(
        loss_sum=loss_sum,
        per_token=per_token,
        divergence=named["value"],
        reverse_kl=named["reverse_kl"],
        forward_kl=named["forward_kl"],
        student_entropy=named["student_entropy"],
        teacher_entropy=named["teacher_entropy"],
        top1_agreement=extra[0],
        student_logprob=None if targets is None else extra[1],
        teacher_logprob=None if targets is None else extra[2],
        policy=None if policy is None else PolicyResult(*of_policy),
    )


def _check_tensors(hidden: torch.Tensor, head: torch.Tensor, teachers: Sequence[Projection]) -> None:
    if isinstance(teachers, torch.Tensor) or any(isinstance(pair, torch.Tensor) or len(pair) != 2 for pair in teachers):
        raise ConfigError("teachers must be a list of (hidden, head) pairs: wrap a single teacher as [(hidden, head)]")
    check_matrix("student_hidden", hidden, hidden)
    check_matrix("student_head", head, hidden)
    check_projection("student", hidden, head)
    for index, (teacher_hidden, teacher_head) in enumerate(teachers):
        check_matrix(f"teacher {index} hidden", teacher_hidden, hidden, rows=len(hidden))
        check_matrix(f"teacher {index} head", teacher_head, hidden)
        check_projection(f"teacher {index}", teacher_hidden, teacher_head)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The arguments of one call that autograd does not track."""

    objective: Objective
    teachers: Sequence[Projection]
    entries: Entries | None
    """Of a top-k teacher, which is alone."""
    token_weights: torch.Tensor | None
    targets: torch.Tensor | None
    policy: PolicyTerm | None
    chunks: Sequence[slice]
    shards: int
    """Ranks that the tokens are sharded over."""
    described: bool
    hidden_grad: bool
    head_grad: bool


class _FromHidden(torch.autograd.Function):
    """Keeps d hidden [T, h] and d head [v, h], made in forward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, plan: _Plan) -> tuple[torch.Tensor, ...]:
        chunked = _Chunked(hidden, head, plan)
        terms = chunked.run()
        sums, extra = terms.sums, torch.stack([terms.top1, *([] if terms.logprobs is None else terms.logprobs)])
        per_token = torch.zeros_like(terms.value)  # 0 times an infinite divergence is not a NaN
        if plan.objective.lambda_distill:
            per_token = terms.value * plan.objective.lambda_distill
        of_policy = per_token.new_zeros(0)
        if plan.policy is not None and terms.policy is not None:
            of_policy = torch.stack(list(terms.policy))
            per_token = per_token + plan.policy.coef * terms.policy.loss
        weighted = per_token
        if chunked.weights is not None:
            # A masked infinity is not a NaN.
            weighted = torch.where(chunked.weights == 0, 0, chunked.weights * per_token)
        ctx.group, ctx.shards = plan.objective.group, plan.shards
        ctx.save_for_backward(chunked.hidden_gradient, chunked.head_gradient_in(head.dtype))
        ctx.mark_non_differentiable(per_token, sums, extra, of_policy)
        return weighted.sum(), per_token, sums, extra, of_policy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = _summed(hidden_gradient, grad_loss, ctx.group, ctx.shards)
        if head_gradient is not None:
            head_gradient = _times(head_gradient, grad_loss)
        return hidden_gradient, head_gradient, None


def _times(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The product; without a pass over memory where the factor is 1 and asking costs no synchronisation."""
    return gradient if factor.device.type == "cpu" and factor.item() == 1 else gradient * factor


def _summed(gradient: torch.Tensor, factor: torch.Tensor, group: dist.ProcessGroup | None, shards: int) -> torch.Tensor:
    """d hidden of the whole vocabulary: of all tokens, or of this rank's where they are sharded."""
    total = gradient.to(factor.dtype) * factor
    if group is not None and total.numel():
        if shards > 1:
            mine = total.new_empty(len(total) // shards, total.shape[1])
            dist.reduce_scatter_tensor(mine, total, group=group)
            total = mine
        else:
            dist.all_reduce(total, group=group)
    return total.to(gradient.dtype)


def _gathered(hidden: torch.Tensor, plan: _Plan) -> torch.Tensor:
    """[T, h] of all tokens."""
    hidden = hidden.detach()
    if plan.shards == 1 or not hidden.numel():
        return hidden
    whole = hidden.new_empty(len(hidden) * plan.shards, hidden.shape[1])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=plan.objective.group)
    return whole


class _Chunked:
    """One forward pass over chunks of tokens, with the buffers they share."""

    def __init__(self, hidden: torch.Tensor, head: torch.Tensor, plan: _Plan) -> None:
        self.plan, self.hidden = plan, _gathered(hidden, plan)
        self.columns = plan.objective.columns
        self.head = head.detach()[: self.columns]
        self.teachers = [(_gathered(states, plan), weight.detach()[: self.columns]) for states, weight in plan.teachers]
        self.tokens = max((chunk.stop - chunk.start for chunk in plan.chunks), default=0)
        kind = Engine if plan.entries is None else TopKEngine
        self.engine = kind(
            plan.objective, max(self.tokens, 1), hidden.device, [states.dtype for states in self._all_hidden()]
        )
        weights = plan.token_weights
        self.weights = None if weights is None else weights.to(plan.objective.dtype)
        self.hidden_gradient = torch.empty_like(self.hidden) if plan.hidden_grad else None
        self.head_gradient = self._new_head_gradient(head) if plan.head_grad else None

    def run(self) -> Terms:
        if not len(self.hidden):
            return self._nothing()
        buffers = [chunk_memory.borrow((self.tokens, self.columns), states) for states in self._all_hidden()]
        try:
            parts = [self._chunk(rows, buffers) for rows in self.plan.chunks]
        finally:
            for buffer in buffers:
                chunk_memory.give_back(buffer)
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _all_hidden(self) -> list[torch.Tensor]:
        return [self.hidden, *(states for states, _ in self.teachers)]

    def _nothing(self) -> Terms:
        empty = torch.empty(0, dtype=self.plan.objective.dtype, device=self.hidden.device)
        policy = None if self.plan.policy is None else PolicyResult(*[empty] * len(PolicyResult._fields))
        logprobs = None if self.plan.targets is None else empty.expand(2, 0)
        return Terms(empty.expand(len(SUMS), 0), empty, logprobs, policy)

    def _chunk(self, rows: slice, buffers: Sequence[torch.Tensor]) -> Terms:
        hidden = self.hidden[rows]
        logits = [buffer[: len(hidden)] for buffer in buffers]
        torch.mm(hidden, self.head.t(), out=logits[0])
        for (states, head), out in zip(self.teachers, logits[1:], strict=True):
            torch.mm(states[rows], head.t(), out=out)
        plan = self.plan
        wanted = plan.hidden_grad or plan.head_grad
        terms = self.engine.run(
            Call(
                student=logits[0],
                teachers=logits[1:],
                weights=None if self.weights is None else self.weights[rows],
                targets=None if plan.targets is None else plan.targets[rows],
                policy=None if plan.policy is None else plan.policy.rows(rows),
                gradient=logits[0] if wanted else None,
                described=plan.described,
                entries=None if plan.entries is None else plan.entries.rows(rows),
            )
        )
        if self.hidden_gradient is not None:
            times_head(logits[0], self.head, out=self.hidden_gradient[rows])
        if self.head_gradient is not None:
            add_outer(self.head_gradient[: self.columns], logits[0], hidden, first=rows.start == 0)
        return terms

    def _new_head_gradient(self, head: torch.Tensor) -> torch.Tensor:
        # Products of bf16 matrices are bf16, so a sum of two needs no wider storage; a longer one does.
        dtype = head.dtype if len(self.plan.chunks) <= 2 else torch.promote_types(head.dtype, torch.float32)
        gradient = large_empty(tuple(head.shape), dtype, head.device)
        gradient[self.columns if len(self.hidden) else 0 :].zero_()
        return gradient

    def head_gradient_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.head_gradient is None else self.head_gradient.to(dtype)


def _joined(parts: Sequence[Terms]) -> Terms:
    policy = None
    if parts[0].policy is not None:
        fields = zip(*(part.policy for part in parts if part.policy is not None), strict=True)
        policy = PolicyResult(*(torch.cat(field) for field in fields))
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return Terms(
        torch.cat([part.sums for part in parts], dim=1),
        torch.cat([part.top1 for part in parts]),
        torch.cat(logprobs, dim=1) if logprobs else None,
        policy,
    )
