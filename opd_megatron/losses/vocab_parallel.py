"""The divergence from logits that are already there: two collectives forward, none backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from opd_megatron.losses.core.topk_loss import TopKLoss
from opd_megatron.losses.core.validation import LossArguments, LossSpec, check_matrix, check_whole, make_spec
from opd_megatron.losses.core.vocab_parallel_loss import LossInputs, VocabParallelLoss
from opd_megatron.losses.topk import TopKEntries, TopKTeacher, check_entries, split_topk

# Elements that are scaled at a time in backward.
_BLOCK_ELEMENTS = 2**22


def vocab_parallel_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | Sequence[torch.Tensor] | TopKTeacher,
    *,
    type: str = "reverse_kl",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    teacher_weights: Sequence[float] | None = None,
    combine: str = "logit_mean",
    **parameters: float,
) -> torch.Tensor:
    """Computes the exact divergence per token between vocabulary-sharded logits.

    Rank r of the group holds columns [r v, (r + 1) v). Teachers are constants. Statistics are fp32 (float64 when an
    input is); the gradient comes back in the dtype of `student_logits`, 0 in padded columns.

    Args:
        student_logits: [T, v], this rank's shard; differentiable.
        teacher_logits: [T, v], or a list of them (an ensemble); or a `TopKTeacher`: the divergence of its entries and
            one tail that holds the rest.
        type: a name in `DIVERGENCES` (losses/divergences.py has the formulae): `reverse_kl`, `forward_kl`, `gkd`,
            `skew_reverse_kl`, `skew_forward_kl`, `lambda_jsd`.
        temperature: divides all logits; the gradient carries its 1/T and no T^2.
        vocab_size: true vocabulary; columns at or past it take no part. All columns by default.
        group: tensor-parallel process group; None = not sharded.
        teacher_weights: shares of the ensemble, normalised to sum to one; equal by default.
        combine: `logit_mean` mixes the teachers' logits, `prob_mean` their probabilities.
        parameters: the number of its own that the divergence takes: `beta` of `gkd` (0 is forward KL, 1 is reverse KL),
            `alpha` of the skewed KLs (how much of its own first argument is mixed into the second; 0 is the plain KL),
            `lambda_coef` of `lambda_jsd` (the student's share).

    Returns:
        [T] divergence in nats, the same on every rank of the group.

    Raises:
        ConfigError: (a ValueError) arguments that are out of range or do not fit together, before any collective.
    """
    others, topk = split_topk(teacher_logits)
    teachers = [others] if isinstance(others, torch.Tensor) else list(others)
    check_matrix("student_logits", student_logits, student_logits)
    for index, logits in enumerate(teachers):
        check_matrix(f"teacher_logits[{index}]", logits, student_logits, rows=len(student_logits))
    # The entries of a top-k teacher are of all columns, whatever the student's.
    everyone = [student_logits, *(teachers if topk is None else [student_logits])]
    widths, dtypes = [x.shape[1] for x in everyone], [x.dtype for x in everyone]
    arguments = LossArguments.of(
        type=type, temperature=temperature, vocab_size=vocab_size, group=group, teacher_weights=teacher_weights,
        combine=combine, **parameters,
    )  # fmt: skip
    if topk is not None:
        check_whole(type)
    spec = make_spec(arguments, widths, dtypes)
    entries = None if topk is None else check_entries(topk, student_logits, spec)
    differentiable = torch.is_grad_enabled() and student_logits.requires_grad
    loss: torch.Tensor = _FromLogits.apply(student_logits, teachers, entries, spec, differentiable)
    return loss


class _FromLogits(torch.autograd.Function):
    """Computes value and gradient together; keeps only the gradient, [T, v] in the logits' dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teachers: list[torch.Tensor],
        entries: TopKEntries | None,
        spec: LossSpec,
        differentiable: bool,
    ) -> torch.Tensor:
        owned = slice(0, spec.columns)
        gradient = None
        if differentiable:
            gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
            gradient[:, spec.columns :].zero_()
            ctx.save_for_backward(gradient)
        if not len(student):
            return student.new_zeros(0, dtype=spec.dtype)
        kind = VocabParallelLoss if entries is None else TopKLoss
        loss_fn = kind(spec, len(student), student.device, [x.dtype for x in (student, *teachers)])
        local = None if gradient is None else gradient[:, owned]
        logits = [x.detach()[:, owned] for x in (student, *teachers)]
        return loss_fn.run(
            LossInputs(logits[0], logits[1:], gradient=local, with_metrics=False, entries=entries)
        ).value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        result = torch.empty_like(gradient)
        if gradient.dtype == grad_loss.dtype:
            torch.mul(gradient, grad_loss.unsqueeze(-1), out=result)
            return result, None, None, None, None
        # In blocks: the product of bf16 and fp32 is made in fp32, which would be a second and a third [T, v].
        rows = max(1, _BLOCK_ELEMENTS // max(gradient.shape[1], 1))
        for start in range(0, len(gradient), rows):
            block = slice(start, start + rows)
            result[block] = gradient[block] * grad_loss[block].unsqueeze(-1)
        return result, None, None, None, None
