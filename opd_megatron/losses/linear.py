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

from opd_megatron.errors import ConfigError
from opd_megatron.losses.core.chunks import chunk_bounds
from opd_megatron.losses.core.linear_pass import FusedLinearArgs, FusedLinearDivergence, MainGrad, Projection
from opd_megatron.losses.core.validation import (
    LossArguments,
    check_gather_index,
    check_matrix,
    check_per_token,
    check_projection,
    check_targets,
    check_whole,
    make_spec,
)
from opd_megatron.losses.kernels.base import SUMS
from opd_megatron.losses.policy import PolicyResult, PolicyTerm, check_policy
from opd_megatron.losses.shared import SharedTeacher, check_shared, split_shared
from opd_megatron.losses.topk import TopKTeacher, check_entries, split_topk

TeacherOutput = tuple[torch.Tensor, torch.Tensor] | Projection | TopKTeacher | SharedTeacher
"""What a teacher gives for a micro batch and the loss takes, unopened in between: hidden states and head, its top-k
entries, or states and head of another vocabulary."""


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
    teachers: Sequence[TeacherOutput],
    *,
    type: str = "reverse_kl",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    teacher_weights: Sequence[float] | None = None,
    combine: str = "logit_mean",
    token_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    gather_index: torch.Tensor | None = None,
    **parameters: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (loss_sum scalar, per_token [T] detached); see `linear_divergence_terms` for arguments and errors."""
    terms = linear_divergence_terms(
        student_hidden, student_head, teachers, type=type, temperature=temperature, vocab_size=vocab_size,
        group=group, teacher_weights=teacher_weights, combine=combine, token_weights=token_weights,
        chunk_tokens=chunk_tokens, gather_index=gather_index, with_metrics=False, **parameters,
    )  # fmt: skip
    return terms.loss_sum, terms.per_token


def linear_divergence_terms(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teachers: Sequence[TeacherOutput],
    *,
    token_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    targets: torch.Tensor | None = None,
    policy: PolicyTerm | None = None,
    gather_index: torch.Tensor | None = None,
    with_metrics: bool = True,
    values_checked: bool = False,
    main_grad: MainGrad | None = None,
    **loss: Any,
) -> DivergenceTerms:
    """Computes a student's exact divergence from its teachers from hidden states, with two collectives for each chunk.

    Rank r of the group holds rows [r v, (r + 1) v) of every head and the same hidden states as the other ranks. The
    gradient of `student_hidden` is the full one on every rank (summed over the group in backward); that of
    `student_head` is this rank's rows. Teachers are constants. `losses.reference` is the same, dense, in thirty lines.

    Args:
        student_hidden: [T, h]; differentiable. T may be 0.
        student_head: [v, h]; differentiable, and may be a tied embedding.
        teachers: (hidden [T, h_i], head [v, h_i]) of each; none with `lambda_distill=0`, and then KLs are 0 and the
            teacher's numbers are the student's; or one `TopKTeacher`, whose divergence and metrics are those
            of its entries and one tail that holds the rest (`student_entropy` is of the whole vocabulary; for a token
            outside the top k, `teacher_logprob` assumes that the teacher's tail is shaped like the student's); or one
            `SharedTeacher` of another vocabulary (both entropies are of the whole vocabularies).
        token_weights: [T]; ones by default, 0 masks a token.
        chunk_tokens: tokens whose logits exist at a time; must agree across the group. Chosen by memory by default.
        targets: [T] int64 global token ids whose log-probabilities are wanted.
        policy: a policy-gradient term on the `targets`, in the same pass; with `level="sequence"` a chunk grows until
            it holds whole sequences.
        gather_index: [T] int64, for hidden states that are sharded over the group (sequence parallelism). They, the
            teachers' too, are then this rank's rows [R, h], R the same on every rank; token t is row gather_index[t] of
            all ranks' rows one after another, and a row of no token is padding. Everything else is [T]. The rows are
            gathered, and the gradient is reduce-scattered in backward. A teacher whose rows are dealt to the ranks
            otherwise is given as (hidden, head, its own gather_index).
        with_metrics: False leaves both KLs and both entropies of the result at 0 where that saves time.
        values_checked: the caller has looked whether targets are ids and sequences in order, where they are on the
            host; to look at them on a GPU is to wait for it.
        main_grad: where the gradient of `student_head` is added in this very call, rather than in backward.
        loss: `type` to `combine` as in `vocab_parallel_divergence`, with the divergence's own parameter, and
            `lambda_distill`, the weight of the divergence in the loss.

    Raises:
        ConfigError: (a ValueError) arguments that are out of range or do not fit together, before any collective.
    """
    arguments = LossArguments.of(**loss)
    others, shared = split_shared(teachers)
    pairs, topk = split_topk(others)
    projections = _projections(student_hidden, student_head, pairs, gather_index)
    # The entries of a top-k teacher are of all columns, whatever the student's; another vocabulary's are of none.
    alone = topk is not None or shared is not None or _is_without(projections, arguments, policy)
    heads = [student_head, *([student_head] if alone else [each.head for each in projections])]
    if topk is not None or shared is not None:
        check_whole(arguments.type)
    spec = make_spec(arguments, widths=[len(head) for head in heads], dtypes=[head.dtype for head in heads])
    check_gather_index(gather_index, student_hidden)
    tokens = len(student_hidden if gather_index is None else gather_index)
    rows = student_hidden.new_empty(tokens, 0)
    check_per_token("token_weights", token_weights, rows)
    check_targets(targets, rows, spec.vocab_size, values=not values_checked)
    entries = None if topk is None else check_entries(topk, rows, spec)
    if shared is not None:
        check_shared(shared, rows, spec.columns)
    if policy is not None:
        check_policy(policy, rows, values=not values_checked)
        if targets is None:
            raise ConfigError("targets is missing but the policy term is about sampled tokens: pass their ids")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens={chunk_tokens} must be at least 1: leave it out to have it chosen")
    tracked = torch.is_grad_enabled()
    args = FusedLinearArgs(
        spec=spec, projections=projections, entries=entries,
        token_weights=token_weights, targets=targets, policy=policy,
        shared=shared, chunks=chunk_bounds(tokens, student_head, chunk_tokens, policy),
        gather_index=gather_index, with_metrics=with_metrics,
        hidden_grad=tracked and student_hidden.requires_grad, head_grad=tracked and student_head.requires_grad,
        main_grad=main_grad,
    )  # fmt: skip
    loss_sum, per_token, sums, extra, of_policy = FusedLinearDivergence.apply(student_hidden, student_head, args)
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


def _is_without(projections: Sequence[Projection], arguments: LossArguments, policy: PolicyTerm | None) -> bool:
    """Whether no teacher is needed and none is there: the student's logits then stand for a teacher's."""
    return not projections and arguments.lambda_distill == 0 and policy is not None


def _projections(
    hidden: torch.Tensor, head: torch.Tensor, teachers: Sequence[Any], gather_index: torch.Tensor | None
) -> list[Projection]:
    """Checks the tensors of student and teachers."""
    wrong = isinstance(teachers, torch.Tensor)
    if wrong or any(isinstance(each, torch.Tensor) or len(each) not in (2, 3) for each in teachers):
        raise ConfigError("teachers must be a list of (hidden, head) pairs: wrap a single teacher as [(hidden, head)]")
    check_matrix("student_hidden", hidden, hidden)
    check_matrix("student_head", head, hidden)
    check_projection("student", hidden, head)
    projections = [Projection(*each) for each in teachers]
    for index, (states, weight, own) in enumerate(projections):
        check_matrix(f"teacher {index} hidden", states, hidden, rows=len(hidden) if own is None else None)
        check_matrix(f"teacher {index} head", weight, hidden)
        check_projection(f"teacher {index}", states, weight)
        check_gather_index(own, hidden)
        if own is not None and (gather_index is None or len(own) != len(gather_index)):
            raise ConfigError(
                f"teacher {index} has a gather_index of {len(own)} tokens and the student "
                f"{'none' if gather_index is None else len(gather_index)}: give both, for the same tokens"
            )
    return projections
