"""Teachers of another vocabulary under tensor parallelism: value, gradient and metrics equal the dense reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.errors import ConfigError
from opd_megatron.losses import linear_divergence_terms
from opd_megatron.losses.policy import PolicyTerm
from opd_megatron.losses.shared import SharedTeacher
from tests.losses.reference import EVENT_KINDS, FORMULAE, TEMPERATURES, Errors, failures, pad_columns, relative_error
from tests.ranks import run_ranks

T, ROWS, H, H_TEACHER = 8, 12, 12, 8
VOCAB, COLUMNS, VOCAB_TEACHER = 37, 40, 31
MET = torch.tensor([0, -1, 2, 5, -1, 7, 8, 11])
SPANS = torch.tensor([0, 0, 1, 2, 2, 3, 4, -1])
SPANS_OF_ROWS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 4, 4, -1, -1])


def _shard(matrix: torch.Tensor, rank: int, ranks: int, dim: int = 0) -> torch.Tensor:
    return matrix.chunk(ranks, dim)[rank].contiguous()


class _Case:
    """Student, teacher, and which tokens are in both vocabularies; `others`: of the student's that are not."""

    def __init__(self, dtype: torch.dtype = torch.float32, others: int = 20) -> None:
        generator = torch.Generator().manual_seed(3)
        self.generator = generator
        self.hidden = torch.randn(T, H, generator=generator).to(dtype)
        self.vocab = VOCAB if others else 24
        self.head = torch.randn(self.vocab, H, generator=generator).to(dtype)
        self.states = torch.randn(ROWS, H_TEACHER, generator=generator).to(dtype)
        self.head_of_teacher = torch.randn(VOCAB_TEACHER, H_TEACHER, generator=generator).to(dtype)
        shared = self.vocab - others
        self.mine = torch.randperm(self.vocab, generator=generator)[:shared].sort().values
        self.other = torch.randperm(VOCAB_TEACHER, generator=generator)[:shared]
        self.tokens = torch.randint(0, VOCAB_TEACHER, (ROWS,), generator=generator)
        self.targets = torch.randint(0, self.vocab, (T,), generator=generator)
        self.rollout = -3 * torch.rand(T, generator=generator)
        self.weights = torch.tensor([1.0, 0.7, 0.0, 2, 0.5, 1, 1, 1])
        self.padded = pad_columns(self.head, COLUMNS, generator, dim=0)

    def teacher(self, rank: int, ranks: int, sharded: bool, conditional: bool = False) -> SharedTeacher:
        width = COLUMNS // ranks
        own = (self.mine >= rank * width) & (self.mine < (rank + 1) * width)
        rest = torch.tensor([i for i in range(VOCAB_TEACHER) if i not in self.other.tolist()])
        ids = torch.cat([self.other[own], rest[rank::ranks]])
        places = torch.full((VOCAB_TEACHER,), -1)
        places[ids] = torch.arange(len(ids))
        states = _shard(self.states, rank % ranks if sharded else 0, ranks if sharded else 1)
        return SharedTeacher(
            states, self.head_of_teacher[ids], self.mine[own] - rank * width, MET, SPANS, SPANS_OF_ROWS,
            places[self.tokens], torch.arange(ROWS) if sharded else None, conditional,
        )  # fmt: skip

    def events(self, log: torch.Tensor, shared: torch.Tensor, conditional: bool) -> torch.Tensor:
        p = log[:, shared].exp()
        if conditional:
            return (p / p.sum(-1, keepdim=True)).log()
        return torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).log()

    def spread(self, log_q: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        own = log_q.gather(1, self.tokens[:, None])[:, 0]
        found = drawn.clone()
        for span in range(int(SPANS.max()) + 1):
            mine = span == SPANS
            found[mine] += (own[span == SPANS_OF_ROWS].sum() - drawn[mine].sum()) / mine.sum()
        return found


def _body(rank: int, ranks: int, dtype: torch.dtype, sharded: bool, others: int, kinds: Any) -> Errors:
    errors: Errors = {}
    for type, arguments in kinds:
        for temperature in TEMPERATURES:
            case = _Case(dtype, others)
            found = _errors(case, rank, ranks, type, arguments, temperature, sharded=sharded, conditional=not others)
            errors |= {f"{type} {arguments or ''} at {temperature}: {name}": value for name, value in found.items()}
    return errors


def _errors(
    case: _Case, rank: int, ranks: int, type: str, arguments: Any, temperature: float, *, sharded: bool,
    conditional: bool,
) -> Errors:  # fmt: skip
    split = ranks if sharded else 1
    student = _shard(case.hidden, rank % split, split).requires_grad_()
    mine = _shard(case.padded, rank, ranks).requires_grad_()
    terms = linear_divergence_terms(
        student, mine, [case.teacher(rank, ranks, sharded, conditional)], type=type, temperature=temperature,
        vocab_size=case.vocab, group=dist.group.WORLD, lambda_distill=0.6, token_weights=case.weights, chunk_tokens=3,
        targets=case.targets, policy=PolicyTerm(case.rollout, coef=0.8, advantage="kl"),
        gather_index=torch.arange(T) if sharded else None, **arguments,
    )  # fmt: skip
    terms.loss_sum.backward()
    dense = [x.detach().double().requires_grad_() for x in (case.hidden, case.head)]
    log_p = (dense[0] @ dense[1].t() / temperature).log_softmax(-1)
    log_q = (case.states.double() @ case.head_of_teacher.double().t() / temperature).log_softmax(-1)
    p, q = case.events(log_p, case.mine, conditional), case.events(log_q, case.other, conditional)[MET.clamp(min=0)]
    met = MET >= 0
    divergence = torch.where(met, FORMULAE[type](p, q, **arguments), 0)
    at_targets = log_p.gather(1, case.targets[:, None])[:, 0]
    advantage = case.spread(log_q, case.rollout.double()) - case.rollout
    expected = 0.6 * divergence - 0.8 * (at_targets - case.rollout).exp() * advantage
    (expected * case.weights).sum().backward()
    whole = torch.zeros(COLUMNS, H, dtype=torch.float64)
    assert dense[1].grad is not None
    assert dense[0].grad is not None
    assert mine.grad is not None
    assert student.grad is not None
    whole[: case.vocab] = dense[1].grad
    metrics = {
        "reverse_kl": torch.where(met, FORMULAE["reverse_kl"](p, q), 0),
        "forward_kl": torch.where(met, FORMULAE["forward_kl"](p, q), 0),
        "student_entropy": -(log_p.exp() * log_p).sum(-1),
        "teacher_entropy": torch.where(met, -(log_q.exp() * log_q).sum(-1)[MET.clamp(min=0)], 0),
        "student_logprob": at_targets,
        "teacher_logprob": case.spread(log_q, at_targets.detach()),
        "top1_agreement": (met & _same_best(case, log_p, log_q)).double(),
    }
    return {
        "per token": relative_error(terms.per_token, expected.detach()),
        "d hidden": relative_error(student.grad, _shard(dense[0].grad, rank % split, split)),
        "d head": ((mine.grad.double() - _shard(whole, rank, ranks)).norm() / whole.norm()).item(),
        **{name: relative_error(getattr(terms, name), value.detach()) for name, value in metrics.items()},
    }


def _same_best(case: _Case, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    pairs = dict(zip(case.mine.tolist(), case.other.tolist(), strict=True))
    best = log_q.argmax(-1)[MET.clamp(min=0)].tolist()
    return torch.tensor([pairs.get(a) == b for a, b in zip(log_p.argmax(-1).tolist(), best, strict=True)])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_divergences_with_policy_and_metrics_equal_the_reference(ranks: int, sharded: bool) -> None:
    assert not failures(run_ranks(ranks, _body, torch.float32, sharded, 20, EVENT_KINDS), 1e-5)


@pytest.mark.parametrize("ranks", [1, 4])
def test_without_other_tokens_the_shared_ones_are_compared_among_themselves(ranks: int) -> None:
    assert not failures(run_ranks(ranks, _body, torch.float32, False, 0, EVENT_KINDS), 1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_bf16_it_stays_within_its_rounding(ranks: int) -> None:
    kinds = [("reverse_kl", {}), ("gkd", {"beta": 0.3})]
    assert not failures(run_ranks(ranks, _body, torch.bfloat16, False, 20, kinds), 2e-2)


def test_merging_tokens_only_lowers_the_divergence_and_one_vocabulary_is_exact() -> None:
    case = _Case()
    same = SharedTeacher(
        case.states[:T], torch.randn(VOCAB, H_TEACHER, generator=case.generator), torch.arange(VOCAB), torch.arange(T),
        torch.arange(T), torch.arange(T), case.targets, conditional=True,
    )  # fmt: skip
    exact = linear_divergence_terms(case.hidden, case.head, [(same.hidden, same.head)], targets=case.targets)
    whole = linear_divergence_terms(case.hidden, case.head, [same], targets=case.targets)
    torch.testing.assert_close(whole.reverse_kl, exact.reverse_kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.teacher_logprob, exact.teacher_logprob, rtol=1e-5, atol=1e-5)
    kept = torch.arange(0, VOCAB, 2)
    order = torch.cat([kept, torch.arange(1, VOCAB, 2)])
    some = replace(same, head=same.head[order], columns=kept, conditional=False)
    merged = linear_divergence_terms(case.hidden, case.head, [some])
    assert bool((merged.reverse_kl <= exact.reverse_kl + 1e-6).all())
    assert bool((merged.reverse_kl > 0).all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": MET[:-1]}, r"rows is \[7\] torch.int64 .* must be \[8\]"),
        ({"spans": SPANS.int()}, "spans is .* torch.int32"),
        ({"rows": MET + 1}, "rows reach 12 of 12"),
        ({"columns": torch.tensor([0, COLUMNS])}, r"columns range over \[0, 40\]"),
        ({"hidden": torch.zeros(3, H_TEACHER)}, "hidden has 3 rows for 12 targets"),
        ({"head": torch.zeros(2, H_TEACHER)}, "head has 2 rows for 17 columns"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], words: str) -> None:
    case = _Case()
    teacher = replace(case.teacher(0, 1, False), **change)
    with pytest.raises(ConfigError, match=words):
        linear_divergence_terms(case.hidden, case.head, [teacher], targets=case.targets)
    with pytest.raises(ConfigError, match="one of another vocabulary among 2"):
        linear_divergence_terms(case.hidden, case.head, [case.teacher(0, 1, False)] * 2)
