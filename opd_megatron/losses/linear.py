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
    Objective,
    check_matrix,
    check_per_token,
    check_projection,
    check_targets,
    make_objective,
)
from opd_megatron.losses.engine import Engine

Projection = tuple[torch.Tensor, torch.Tensor]
"""Hidden states [T, h] and this rank's rows of the LM head [v, h]."""

# Bytes of one chunk's student logits. Fewer, larger chunks make larger matrix products and fewer passes over d head;
# the softmax arithmetic works on smaller blocks of its own, so the cache sets no tighter bound.
_CHUNK_BYTES = {"cpu": 32 * 2**20}
_CHUNK_BYTES_GPU = 256 * 2**20
_MIN_CHUNK_TOKENS = 64
# Vocabulary rows of d head that are added to the fp32 sum at a time.
_HEAD_ROWS = 4096


@dataclass(frozen=True)
class DivergenceTerms:
    """What one pass yields. Only `loss_sum` is differentiable; the rest is detached, [T] each, in nats.

    All of it is at the objective's temperature: log-probabilities and entropies are those of softmax(logits / T), so
    an evaluation that wants the model's own negative log-likelihood calls with `temperature=1`.
    """

    loss_sum: torch.Tensor
    """Scalar: sum over tokens of weight times divergence."""
    per_token: torch.Tensor
    """The divergence of each token, not weighted."""
    reverse_kl: torch.Tensor
    forward_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    student_logprob: torch.Tensor | None = None
    """Of `targets`; None without."""
    teacher_logprob: torch.Tensor | None = None


def linear_divergence(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teachers: Sequence[Projection],
    *,
    type: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    teacher_weights: Sequence[float] | None = None,
    combine: str = "logit_mean",
    token_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_sum scalar, per_token [T] detached) of `linear_divergence_terms`."""
    terms = linear_divergence_terms(
        student_hidden, student_head, teachers, type=type, beta=beta, temperature=temperature, vocab_size=vocab_size,
        group=group, teacher_weights=teacher_weights, combine=combine, token_weights=token_weights,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    return terms.loss_sum, terms.per_token


def linear_divergence_terms(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teachers: Sequence[Projection],
    *,
    type: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    teacher_weights: Sequence[float] | None = None,
    combine: str = "logit_mean",
    token_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    targets: torch.Tensor | None = None,
) -> DivergenceTerms:
    """Exact divergence between a student and its teachers from hidden states, with two collectives for each chunk.

    Rank r of the group holds rows [r v, (r + 1) v) of every head and the same hidden states as the other ranks. The
    gradient of `student_hidden` is the full one on every rank (summed over the group in backward); that of
    `student_head` is this rank's rows. Teachers are constants. `type` to `combine`: see `vocab_parallel_divergence`.

    Args:
        student_hidden: [T, h]; differentiable. T may be 0.
        student_head: [v, h]; differentiable, and may be a tied embedding.
        teachers: (hidden [T, h_i], head [v, h_i]) of each.
        token_weights: [T]; ones by default, 0 masks a token.
        chunk_tokens: tokens whose logits exist at a time; must agree across the group. Chosen by memory by default.
        targets: [T] int64 global token ids whose log-probabilities are wanted.

    Raises:
        ConfigError: (a ValueError) arguments that are out of range or do not fit together, before any collective.
    """
    _check_tensors(student_hidden, student_head, teachers)
    heads = [student_head, *(head for _, head in teachers)]
    objective = make_objective(
        type, beta, temperature, vocab_size, group, teacher_weights, combine,
        widths=[len(head) for head in heads], dtypes=[head.dtype for head in heads],
    )  # fmt: skip
    check_per_token("token_weights", token_weights, student_hidden)
    check_targets(targets, student_hidden, objective.vocab_size)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens={chunk_tokens} must be at least 1: leave it out to have it chosen")
    chunk = chunk_tokens or _default_chunk(student_hidden, student_head)
    tracked = torch.is_grad_enabled()
    plan = _Plan(
        objective, teachers, token_weights, targets, chunk,
        hidden_grad=tracked and student_hidden.requires_grad, head_grad=tracked and student_head.requires_grad,
    )  # fmt: skip
    loss_sum, per_token, sums = _FromHidden.apply(student_hidden, student_head, plan)
    reverse, forward, student_entropy, teacher_entropy, student_logprob, teacher_logprob = sums[:6]
    return DivergenceTerms(
        loss_sum=loss_sum,
        per_token=per_token,
        reverse_kl=reverse,
        forward_kl=forward,
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        student_logprob=None if targets is None else student_logprob,
        teacher_logprob=None if targets is None else teacher_logprob,
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


def _default_chunk(hidden: torch.Tensor, head: torch.Tensor) -> int:
    """Equal chunks of bounded size, from what is the same on all ranks of a group."""
    tokens = max(len(hidden), 1)
    limit = _CHUNK_BYTES.get(hidden.device.type, _CHUNK_BYTES_GPU) // (len(head) * head.element_size())
    chunks = -(-tokens // max(limit, _MIN_CHUNK_TOKENS))
    return -(-tokens // chunks)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The arguments of one call that autograd does not track."""

    objective: Objective
    teachers: Sequence[Projection]
    token_weights: torch.Tensor | None
    targets: torch.Tensor | None
    chunk: int
    hidden_grad: bool
    head_grad: bool


class _FromHidden(torch.autograd.Function):
    """Keeps d hidden [T, h] and d head [v, h], made in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, plan: _Plan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chunked = _Chunked(hidden, head, plan)
        sums = chunked.run()
        per_token = chunked.engine.value(sums).clone()
        weighted = per_token
        if plan.token_weights is not None:
            weights = plan.token_weights.to(per_token.dtype)
            weighted = torch.where(weights == 0, 0, weights * per_token)  # a masked infinity is not a NaN
        ctx.group = plan.objective.group
        ctx.save_for_backward(chunked.hidden_gradient, chunked.head_gradient_in(head.dtype))
        ctx.mark_non_differentiable(per_token, sums)
        return weighted.sum(), per_token, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            dtype = hidden_gradient.dtype
            total = hidden_gradient.to(grad_loss.dtype) * grad_loss
            if ctx.group is not None and total.numel():
                dist.all_reduce(total, group=ctx.group)
            hidden_gradient = total.to(dtype)
        if head_gradient is not None:
            head_gradient = head_gradient * grad_loss
        return hidden_gradient, head_gradient, None


class _Chunked:
    """One forward pass over chunks of tokens, with the buffers they share."""

    def __init__(self, hidden: torch.Tensor, head: torch.Tensor, plan: _Plan) -> None:
        self.plan, self.hidden = plan, hidden
        self.columns = plan.objective.columns
        self.head = head[: self.columns]
        self.teachers = [(states.detach(), weight.detach()[: self.columns]) for states, weight in plan.teachers]
        self.tokens = min(plan.chunk, len(hidden))
        self.engine = Engine(plan.objective, max(self.tokens, 1), hidden.device)
        shape = (self.tokens, self.columns)
        self.logits = [states.new_empty(shape) for states in (hidden, *(states for states, _ in self.teachers))]
        self.factor = self._factor()
        self.hidden_gradient = torch.empty_like(hidden) if plan.hidden_grad else None
        self.head_gradient = self._new_head_gradient(head) if plan.head_grad else None

    def run(self) -> torch.Tensor:
        """All per-token sums, [len(engine.names), T]."""
        if not len(self.hidden):
            return self.engine.run(self.logits[0], self.logits[1:])
        starts = range(0, len(self.hidden), self.tokens)
        return torch.cat([self._chunk(slice(start, start + self.tokens)) for start in starts], dim=1)

    def _chunk(self, rows: slice) -> torch.Tensor:
        hidden, targets = self.hidden[rows], self.plan.targets
        logits = [buffer[: len(hidden)] for buffer in self.logits]
        torch.mm(hidden, self.head.t(), out=logits[0])
        for (states, head), out in zip(self.teachers, logits[1:], strict=True):
            torch.mm(states[rows], head.t(), out=out)
        wanted = self.plan.hidden_grad or self.plan.head_grad
        sums = self.engine.run(
            logits[0],
            logits[1:],
            targets=None if targets is None else targets[rows],
            gradient=logits[0] if wanted else None,
            factor=None if self.factor is None else self.factor[rows],
        )
        if self.hidden_gradient is not None:
            torch.mm(logits[0], self.head, out=self.hidden_gradient[rows])
        if self.head_gradient is not None:
            self._add_head_gradient(self.head_gradient[: self.columns], logits[0], hidden, first=rows.start == 0)
        return sums

    def _factor(self) -> torch.Tensor | None:
        weights = self.plan.token_weights
        return None if weights is None else weights.to(self.plan.objective.dtype)

    def _new_head_gradient(self, head: torch.Tensor) -> torch.Tensor:
        # Products of bf16 matrices are bf16, so a sum of two needs no wider storage; a longer one does.
        dtype = head.dtype if len(self.hidden) <= 2 * self.tokens else torch.promote_types(head.dtype, torch.float32)
        gradient = torch.empty_like(head, dtype=dtype, memory_format=torch.contiguous_format)
        gradient[self.columns if len(self.hidden) else 0 :].zero_()
        return gradient

    @staticmethod
    def _add_head_gradient(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor, first: bool) -> None:
        """total (+)= gradient^T hidden, [columns, h]; added in fp32 or wider."""
        if first and total.dtype == hidden.dtype:
            torch.mm(gradient.t(), hidden, out=total)
            return
        if hidden.element_size() >= 4:
            total.addmm_(gradient.t(), hidden)
            return
        # In pieces: no copy of the whole, and conversions stay in the cache.
        for start in range(0, len(total), _HEAD_ROWS):
            rows = slice(start, start + _HEAD_ROWS)
            part = torch.mm(gradient[:, rows].t(), hidden)
            total[rows].copy_(part if first else part.float().add_(total[rows].float()))

    def head_gradient_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.head_gradient is None else self.head_gradient.to(dtype)
