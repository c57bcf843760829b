"""Tensor-parallel divergences equal a dense float64 reference, in value and in every gradient."""

from __future__ import annotations

import itertools
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from opd_megatron.losses import linear_divergence, linear_divergence_terms, reduction, vocab_parallel_divergence
from opd_megatron.losses.divergences import DIVERGENCES
from opd_megatron.losses.kernels import use_backend
from tests.losses.reference import (
    ENSEMBLES,
    KINDS,
    TEMPERATURES,
    Errors,
    dense_divergence,
    failures,
    log_teacher,
    pad_columns,
    relative_error,
)
from tests.ranks import run_ranks

T, H = 7, 12
PADDING = ((40, 40), (37, 40), (19, 40))
"""True vocabulary and columns over all ranks: none, a part of the last rank, whole ranks (at TP 2 and 4)."""


def _shard(matrix: torch.Tensor, rank: int, ranks: int, dim: int) -> torch.Tensor:
    return matrix.chunk(ranks, dim)[rank].contiguous()


def _cases():
    for (type, arguments), temperature, (combine, weights) in itertools.product(KINDS, TEMPERATURES, ENSEMBLES):
        yield type, arguments, temperature, combine, weights


def _name(type, arguments, temperature, combine, weights) -> str:
    return f"{type} {arguments or ''} at temperature {temperature}, {combine} of {weights or 'one teacher'}"


def _logits_body(rank: int, ranks: int, vocab_size: int, columns: int) -> Errors:
    generator = torch.Generator().manual_seed(0)
    full = [3 * torch.randn(T, vocab_size, generator=generator) for _ in range(3)]
    shards = [_shard(pad_columns(x, columns, generator), rank, ranks, 1) for x in full]
    token_weights = torch.rand(T, generator=generator)
    errors: Errors = {}
    for type, arguments, temperature, combine, weights in _cases():
        count = 1 if weights is None else len(weights)
        student = shards[0].clone().requires_grad_()
        loss = vocab_parallel_divergence(
            student, shards[1 : 1 + count], type=type, **arguments, temperature=temperature, vocab_size=vocab_size,
            group=dist.group.WORLD, teacher_weights=weights, combine=combine,
        )  # fmt: skip
        (loss * token_weights).sum().backward()
        dense = full[0].double().requires_grad_()
        expected = dense_divergence(dense, full[1 : 1 + count], type, temperature, combine, weights, **arguments)
        (expected * token_weights).sum().backward()
        padded = torch.zeros(T, columns, dtype=torch.float64)
        padded[:, :vocab_size] = dense.grad
        # Errors of a shard are measured against the whole gradient: a rank may hold none of it.
        share = (student.grad.double() - _shard(padded, rank, ranks, 1)).norm() / padded.norm()
        case = _name(type, arguments, temperature, combine, weights)
        errors[f"{case}: loss"] = relative_error(loss.detach(), expected.detach())
        errors[f"{case}: d student"] = share.item()
    return errors


@pytest.mark.parametrize(("vocab_size", "columns"), PADDING)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_logits_form_equals_dense_float64_reference(ranks: int, vocab_size: int, columns: int) -> None:
    assert not failures(run_ranks(ranks, _logits_body, vocab_size, columns), 1e-5)


def _linear_body(rank: int, ranks: int, vocab_size: int, columns: int, dtype: torch.dtype) -> Errors:
    generator = torch.Generator().manual_seed(1)
    sizes = (H, H, H + 4)
    hidden = [torch.randn(T, h, generator=generator).to(dtype) for h in sizes]
    heads = [(0.7 * torch.randn(vocab_size, h, generator=generator)).to(dtype) for h in sizes]
    shards = [_shard(pad_columns(head, columns, generator, dim=0), rank, ranks, 0) for head in heads]
    token_weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.0, 1.0])
    errors: Errors = {}
    for index, (type, arguments, temperature, combine, weights) in enumerate(_cases()):
        count = 1 if weights is None else len(weights)
        student, head = hidden[0].clone().requires_grad_(), shards[0].clone().requires_grad_()
        loss, per_token = linear_divergence(
            student, head, list(zip(hidden[1 : 1 + count], shards[1 : 1 + count], strict=True)),
            type=type, **arguments, temperature=temperature, vocab_size=vocab_size, group=dist.group.WORLD,
            teacher_weights=weights, combine=combine, token_weights=token_weights, chunk_tokens=(2, 4, None)[index % 3],
        )  # fmt: skip
        (3 * loss).backward()
        dense = [hidden[0].double().requires_grad_(), heads[0].double().requires_grad_()]
        teachers = [h.double() @ w.double().t() for h, w in zip(hidden[1 : 1 + count], heads[1:], strict=False)]
        expected = dense_divergence(dense[0] @ dense[1].t(), teachers, type, temperature, combine, weights, **arguments)
        (3 * (expected * token_weights).sum()).backward()
        padded = torch.zeros(columns, H, dtype=torch.float64)
        padded[:vocab_size] = dense[1].grad
        share = (head.grad.double() - _shard(padded, rank, ranks, 0)).norm() / padded.norm()
        case = _name(type, arguments, temperature, combine, weights)
        errors[f"{case}: per token"] = relative_error(per_token, expected.detach())
        errors[f"{case}: loss"] = relative_error(loss.detach(), (expected * token_weights).sum().detach())
        errors[f"{case}: d hidden"] = relative_error(student.grad, dense[0].grad)
        errors[f"{case}: d head"] = share.item()
    return errors


@pytest.mark.parametrize(("vocab_size", "columns"), PADDING)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_linear_form_equals_dense_float64_reference(ranks: int, vocab_size: int, columns: int) -> None:
    assert not failures(run_ranks(ranks, _linear_body, vocab_size, columns, torch.float32), 1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_linear_form_in_bf16_stays_within_its_rounding(ranks: int) -> None:
    assert not failures(run_ranks(ranks, _linear_body, 37, 40, torch.bfloat16), 2e-2)


def _metrics_body(rank: int, ranks: int, combine: str, weights: tuple[float, ...] | None, backend: str) -> Errors:
    generator = torch.Generator().manual_seed(2)
    count = 1 if weights is None else len(weights)
    hidden = [torch.randn(T, H, generator=generator) for _ in range(1 + count)]
    heads = [torch.randn(19, H, generator=generator) for _ in range(1 + count)]
    hidden[1][:3], heads[1] = hidden[0][:3], heads[0] + 0.1 * heads[1]  # some tokens are agreed on
    shards = [_shard(pad_columns(head, 40, generator, dim=0), rank, ranks, 0) for head in heads]
    targets = torch.randint(19, (T,), generator=generator)
    with use_backend(backend):
        terms = linear_divergence_terms(
            hidden[0], shards[0], list(zip(hidden[1:], shards[1:], strict=True)), type="gkd", beta=0.3, vocab_size=19,
            group=dist.group.WORLD, chunk_tokens=3, targets=targets, temperature=1.5, combine=combine,
            teacher_weights=weights,
        )  # fmt: skip
    logits = [h.double() @ w.double().t() for h, w in zip(hidden, heads, strict=True)]
    log_p, log_q = (logits[0] / 1.5).log_softmax(-1), log_teacher(logits[1:], 1.5, combine, weights)
    expected = {
        "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "student_entropy": -(log_p.exp() * log_p).sum(-1),
        "teacher_entropy": -(log_q.exp() * log_q).sum(-1),
        "student_logprob": log_p.gather(1, targets[:, None])[:, 0],
        "teacher_logprob": log_q.gather(1, targets[:, None])[:, 0],
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
    }
    assert 0 < expected["top1_agreement"].sum() < T
    return {name: relative_error(getattr(terms, name), value) for name, value in expected.items()}


@pytest.mark.parametrize(("combine", "weights"), ENSEMBLES)
@pytest.mark.parametrize(
    ("ranks", "backend"), [(1, "torch"), (1, "compiled"), (2, "torch"), (2, "compiled"), (4, "torch")]
)
def test_metrics_of_the_same_pass_equal_the_reference(ranks: int, backend: str, combine: str, weights) -> None:
    assert not failures(run_ranks(ranks, _metrics_body, combine, weights, backend), 1e-5)


def _agreement_body(rank: int, ranks: int) -> list[float]:
    """Ties: the student's first largest entry counts, wherever its rank is; the teacher may like others as much."""
    student = torch.tensor([[1.0, 5, 5, 0], [0, 0, 7, 7], [3, 3, 3, 3]])
    teacher = torch.tensor([[0.0, 9, 9, 9], [8, 0, 0, 8], [2, 2, 2, 2]])
    shards = [_shard(x, rank, ranks, 1) for x in (student, teacher)]
    identity = torch.eye(4 // ranks)  # logits as hidden states: one rank's columns at a time
    terms = linear_divergence_terms(
        *(shards[0], identity), [(shards[1], identity)], group=dist.group.WORLD if ranks > 1 else None
    )
    return terms.top1_agreement.tolist()


def test_top1_agreement_takes_the_students_first_favourite() -> None:
    # At TP 2 each rank passes its own "hidden states"; their columns together are the logits above.
    assert run_ranks(1, _agreement_body) == [[1.0, 0.0, 1.0]]
    assert run_ranks(2, _agreement_body) == [[1.0, 0.0, 1.0]] * 2


def _compiled_body(rank: int, ranks: int, dtype: torch.dtype) -> Errors:
    """The stages of the compiled backend, one divergence of every kind."""
    generator = torch.Generator().manual_seed(5)
    full = [(3 * torch.randn(T, 37, generator=generator)).to(dtype) for _ in range(2)]
    shards = [_shard(pad_columns(x, 40, generator), rank, ranks, 1) for x in full]
    errors: Errors = {}
    for type in DIVERGENCES:
        student = shards[0].clone().requires_grad_()
        with use_backend("compiled"):
            loss = vocab_parallel_divergence(
                student, shards[1], type=type, temperature=2.0, vocab_size=37, group=dist.group.WORLD
            )
            loss.sum().backward()
        dense = full[0].double().requires_grad_()
        expected = dense_divergence(dense, [full[1]], type, 2.0)
        expected.sum().backward()
        padded = torch.zeros(T, 40, dtype=torch.float64)
        padded[:, :37] = dense.grad
        share = (student.grad.double() - _shard(padded, rank, ranks, 1)).norm() / padded.norm()
        rounding = 1e-5 if dtype == torch.float32 else 1e-2  # only the gradient is rounded to the logits' type
        assert share <= rounding
        errors[type] = relative_error(loss.detach(), expected.detach())
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_of_the_compiled_backend_equal_the_reference(dtype: torch.dtype) -> None:
    assert not failures(run_ranks(2, _compiled_body, dtype), 1e-5)


def _sharded_rows_body(rank: int, ranks: int) -> Errors:
    """Hidden states whose rows lie unevenly over the ranks, in another order, with padding that must not take part."""
    generator = torch.Generator().manual_seed(6)
    tokens, rows = 8, 8
    hidden = [torch.randn(tokens, H, generator=generator) for _ in range(2)]
    heads = [torch.randn(20, H, generator=generator) for _ in range(2)]
    weights = torch.tensor([1.0, 0, 2, 1, 1, 0, 1, 0.5])
    # Every rank has room for all rows; the first one has most of the tokens.
    places = torch.randperm(tokens, generator=generator) + torch.tensor([0, 0, 0, 0, 0, 0, 0, (ranks - 1) * rows])
    everyones = [torch.full((ranks * rows, H), 1e30).index_copy(0, places, states) for states in hidden]
    mine = _shard(everyones[0], rank, ranks, 0).requires_grad_()
    head = _shard(heads[0], rank, ranks, 0).requires_grad_()
    loss, per_token = linear_divergence(
        mine, head, [(_shard(everyones[1], rank, ranks, 0), _shard(heads[1], rank, ranks, 0))], type="gkd",
        group=dist.group.WORLD, token_weights=weights, gather_index=places, chunk_tokens=3,
    )  # fmt: skip
    loss.backward()
    dense = [hidden[0].double().requires_grad_(), heads[0].double().requires_grad_()]
    expected = dense_divergence(dense[0] @ dense[1].t(), [hidden[1].double() @ heads[1].double().t()], "gkd")
    (expected * weights).sum().backward()
    gradient = torch.zeros(ranks * rows, H, dtype=torch.float64).index_copy(0, places, dense[0].grad)
    padding = torch.ones(ranks * rows, dtype=torch.bool).index_fill(0, places, False)
    return {
        "per token": relative_error(per_token, expected.detach()),
        "d hidden": ((mine.grad - _shard(gradient, rank, ranks, 0)).norm() / gradient.norm()).item(),
        "d padding": mine.grad[_shard(padding, rank, ranks, 0)].abs().sum().item(),
        "d head": relative_error(head.grad, _shard(dense[1].grad, rank, ranks, 0)),
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_hidden_states_sharded_over_the_group_equal_the_reference(ranks: int) -> None:
    assert not failures(run_ranks(ranks, _sharded_rows_body), 1e-5)


_COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "broadcast", "reduce")


def _count_collectives(counts: Counter):
    def counted(name):
        original = getattr(dist, name)

        def call(tensor, *args, **kwargs):
            counts[name] += 1
            elements = tensor.numel() if isinstance(tensor, torch.Tensor) else 0
            counts["elements"] = max(counts["elements"], elements)
            return original(tensor, *args, **kwargs)

        return mock.patch.object(dist, name, call)

    return [counted(name) for name in _COLLECTIVES]


def _collectives_body(rank: int, ranks: int, columns: int, combine: str) -> tuple[int, int, int]:
    student = torch.randn(T, columns, requires_grad=True)
    teachers = [torch.randn(T, columns), torch.randn(T, columns)]
    counts: Counter = Counter()
    patches = _count_collectives(counts)
    for patch in patches:
        patch.start()
    try:
        loss = vocab_parallel_divergence(student, teachers, type="gkd", combine=combine, group=dist.group.WORLD)
        forward, largest = sum(counts[name] for name in _COLLECTIVES), counts["elements"]
        loss.sum().backward()
        return forward, sum(counts[name] for name in _COLLECTIVES) - forward, largest
    finally:
        for patch in patches:
            patch.stop()


@pytest.mark.parametrize("combine", ["logit_mean", "prob_mean"])
def test_logits_form_makes_two_small_collectives_forward_and_none_backward(combine: str) -> None:
    small, large = (run_ranks(2, _collectives_body, columns, combine) for columns in (8, 4096))
    assert all((forward, backward) == (2, 0) for forward, backward, _ in small + large)
    assert [elements for *_, elements in small] == [elements for *_, elements in large]


def _blocks_body(rank: int, ranks: int, combine: str) -> Errors:
    """The same call with blocks of one row: every stage reads its rows again."""
    generator = torch.Generator().manual_seed(3)
    student, *teachers = (_shard(3 * torch.randn(T, 40, generator=generator), rank, ranks, 1) for _ in range(3))
    results = []
    for elements in (1, 2**21):
        with mock.patch("opd_megatron.losses.kernels.torch.ops._BLOCK_ELEMENTS_CPU", elements):
            logits = student.clone().requires_grad_()
            loss = vocab_parallel_divergence(
                logits, teachers, type="gkd", temperature=2.0, group=dist.group.WORLD, combine=combine
            )
            loss.sum().backward()
            results.append(torch.cat([loss.detach(), logits.grad.flatten()]))
    return {"loss and gradient": relative_error(results[0], results[1].double())}


@pytest.mark.parametrize("combine", ["logit_mean", "prob_mean"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_result_does_not_depend_on_the_block_size(ranks: int, combine: str) -> None:
    assert not failures(run_ranks(ranks, _blocks_body, combine), 1e-6)


def _empty_body(rank: int, ranks: int) -> tuple[float, float, float]:
    hidden, head = torch.zeros(0, H, requires_grad=True), torch.randn(20, H, requires_grad=True)
    loss, per_token = linear_divergence(hidden, head, [(torch.zeros(0, H), head.detach())], group=dist.group.WORLD)
    loss.backward()
    assert hidden.grad.shape == (0, H)
    assert per_token.shape == (0,)
    return loss.item(), head.grad.abs().sum().item(), float(rank)


def test_micro_batch_without_response_tokens_costs_nothing_and_does_not_hang() -> None:
    assert run_ranks(2, _empty_body) == [(0.0, 0.0, 0.0), (0.0, 0.0, 1.0)]


def _validation_body(rank: int, ranks: int) -> list[str]:
    x = torch.randn(T, 20)
    calls = (
        {"type": "kl"},
        {"type": "gkd", "beta": 1.5},
        {"temperature": 0.0},
        {"vocab_size": 20 * ranks + 1},
        {"teacher_weights": [1.0, 2.0]},
        {"combine": "mean"},
    )
    messages = []
    with mock.patch.object(dist, "all_gather_into_tensor", side_effect=AssertionError("a collective was made")):
        for arguments in calls:
            with pytest.raises(ValueError) as error:
                vocab_parallel_divergence(x, x, group=dist.group.WORLD, **arguments)
            messages.append(str(error.value))
        with pytest.raises(ValueError) as error:
            vocab_parallel_divergence(x, x[:, :16], group=dist.group.WORLD)
        messages.append(str(error.value))
    return messages


def test_bad_arguments_raise_on_every_rank_before_any_collective() -> None:
    first, *others = run_ranks(2, _validation_body)
    assert all(messages == first for messages in others)
    assert all("\n" not in message and ":" in message for message in first)


def _mean_body(rank: int, ranks: int) -> tuple[list[float], int]:
    """Rank 0 has two micro batches (3 + 0 tokens), rank 1 one of a single token."""
    counts = [3, 0] if rank == 0 else [1]
    parts = [
        reduction.TokenSums(
            loss_sum=torch.tensor(0.0),
            num_tokens=torch.tensor(count),
            sums=torch.full(
                (len(reduction.DIVERGENCE_METRICS),), float(6 * count if rank == 0 else 2), dtype=torch.float64
            ),
            names=reduction.DIVERGENCE_METRICS,
        )
        for count in counts
    ]
    return reduction.global_means(parts, [dist.group.WORLD], torch.device("cpu"))


def test_mean_over_micro_batches_and_ranks_weights_every_token_alike() -> None:
    assert run_ranks(2, _mean_body) == [([20 / 4] * len(reduction.DIVERGENCE_METRICS), 4)] * 2
