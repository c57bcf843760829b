"""The loss of a micro batch, from the student's hidden states and what its teachers gave.

One pass over the vocabulary for every set of teachers, with all terms of the objective but second divergences, each of
which has a pass over its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from opd_megatron.config import ObjectiveConfig
from opd_megatron.losses import DivergenceTerms, linear_divergence_terms
from opd_megatron.losses.core.linear_pass import MainGrad
from opd_megatron.losses.core.validation import check_targets
from opd_megatron.losses.objectives import (
    FORWARD_SHARE,
    REFERENCE_KL,
    Term,
    loss_arguments,
    metric_names,
    objective_terms,
)
from opd_megatron.losses.reduction import (
    LOGPROB_GAP,
    MISMATCH,
    TokenSums,
    add_sums,
    further_sums,
    joined_sums,
    token_sums,
)
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import Model
from opd_megatron.mcore.routed import Part, parts_of, rows_of
from opd_megatron.mcore.whole_sequences import WholeSequences
from opd_megatron.types import Batch, TeacherInputs, at_places, places_of


@dataclass(slots=True)
class StepLoss:
    """Megatron's loss function of one step: call it with a micro batch."""

    model: Model
    grid: ParallelGrid
    teachers: Sequence[TeacherInputs]
    """The reference among them, where the objective has one."""
    objective: ObjectiveConfig
    vocab_size: int
    sampled: bool
    """Whether the engine's log-probabilities are there, and of the distribution that the loss computes."""
    terms: list[Term] = field(init=False)
    names: tuple[str, ...] = field(init=False)
    """Of its metrics, the same on every rank."""

    def __post_init__(self) -> None:
        self.terms = objective_terms(self.objective)
        self.names = self._main_names() + tuple(
            name for term in self.terms if term.is_further for name in term.metrics(True)
        )

    def __call__(self, index: int, hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, TokenSums]:
        """Computes (loss sum, tokens, sums) of the student's micro batch number `index`."""
        mask = batch.response_mask
        check_targets(batch.on_host.targets[mask], batch.on_host.targets[mask], self.vocab_size)
        gather_index = self.model.gather_index(mask)
        teachers = [teacher for teacher in self.teachers if not teacher.reference]
        parts = parts_of(index, batch, mask, teachers, self.model.gather_index)
        sums = add_sums([self._of_part(part, batch, *part.of_student(hidden, gather_index)) for part in parts])
        for term in self.terms:
            if term.of_reference:
                sums = joined_sums(sums, [self._of_reference(term, index, batch, hidden, gather_index)])
        return sums.loss_sum, sums.num_tokens.to(torch.int), sums

    def _of_part(self, part: Part, batch: Batch, hidden: torch.Tensor, gather_index: torch.Tensor | None) -> TokenSums:
        places = places_of(part.mask, hidden.device)
        token_weights = at_places(batch.weights, places)
        arguments = loss_arguments(self.terms, batch, places) | {"targets": at_places(batch.targets, places)}
        policy = arguments["policy"]
        if batch.has_parts and policy is not None and policy.of_sequences:
            with torch.no_grad():
                now = {"type": "reverse_kl", "targets": arguments["targets"], "with_metrics": False}
                first = self._pass(part, hidden.detach(), gather_index, token_weights, **now)
                assert first.student_logprob is not None
                assert first.teacher_logprob is not None
                sequences = WholeSequences(batch, part.mask, self.grid.groups.cp)
                arguments["policy"] = sequences.with_gaps(policy, first.student_logprob, first.teacher_logprob)
        result = self._pass(part, hidden, gather_index, token_weights, **arguments)
        rollout = None
        if self.sampled and batch.rollout_logprobs is not None:
            rollout = at_places(batch.rollout_logprobs, places)
        sums = token_sums(result, token_weights, rollout, self._main_names())
        further = [term for term in self.terms if term.teacher_entropy_above is not None]
        return joined_sums(
            sums, [self._of_some(term, result, part, hidden, gather_index, token_weights) for term in further]
        )

    def _of_some(
        self, term: Term, first: DivergenceTerms, part: Part, hidden: torch.Tensor, gather_index: torch.Tensor | None,
        token_weights: torch.Tensor,
    ) -> TokenSums:  # fmt: skip
        """A second divergence of the tokens at which the teacher is unsure, which the first pass has told."""
        assert term.teacher_entropy_above is not None
        kept = torch.nonzero(first.teacher_entropy > term.teacher_entropy_above).squeeze(1)
        teachers = [rows_of(each, kept, gathered=gather_index is not None) for each in part.teachers]
        chosen = replace(part, teachers=teachers)
        if gather_index is None:
            hidden = hidden.index_select(0, kept)
        else:
            gather_index = gather_index[kept]
        result = self._pass(chosen, hidden, gather_index, token_weights[kept], **term.divergence, with_metrics=False)
        return further_sums(result, token_weights[kept], FORWARD_SHARE, counts=True)

    def _of_reference(
        self, term: Term, index: int, batch: Batch, hidden: torch.Tensor, gather_index: torch.Tensor | None
    ) -> TokenSums:
        references = [teacher for teacher in self.teachers if teacher.reference]
        mask = batch.response_mask
        (part,) = parts_of(index, replace(batch, routes=None), mask, references, self.model.gather_index)
        weights = at_places(batch.weights, places_of(mask, hidden.device))
        result = self._pass(part, hidden, gather_index, weights, **term.divergence, with_metrics=False)
        return further_sums(result, weights, REFERENCE_KL)

    def _pass(
        self, part: Part, hidden: torch.Tensor, gather_index: torch.Tensor | None, token_weights: torch.Tensor,
        **arguments: Any,
    ) -> DivergenceTerms:  # fmt: skip
        objective, head = self.objective, self.model.head_weight
        return linear_divergence_terms(
            hidden,
            head,
            part.teachers,
            **arguments,
            temperature=objective.temperature,
            vocab_size=self.vocab_size,
            group=self.grid.groups.tp if self.grid.tp_size > 1 else None,
            teacher_weights=part.weights,
            combine=objective.combine,
            token_weights=token_weights,
            chunk_tokens=objective.chunk_tokens,
            gather_index=gather_index,
            values_checked=True,
            main_grad=self._main_grad(head) if hidden.requires_grad else None,
        )

    def _main_grad(self, head: torch.Tensor) -> MainGrad | None:
        """The buffer in which DDP sums the head's gradient; it is spared a copy of it, and the head's own dtype. None
        where there is none."""
        total = getattr(head, "main_grad", None)
        if total is None:
            return None
        tied = self.model.is_embedding_too
        if not tied:
            head.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # DDP asks before it adds `.grad`
        return MainGrad(total, announced=not tied)

    def _main_names(self) -> tuple[str, ...]:
        taught = any(not teacher.reference for teacher in self.teachers)
        main = metric_names([term for term in self.terms if not term.is_further], teachers=taught)
        return (*main, *([LOGPROB_GAP, MISMATCH] if self.sampled else []))
