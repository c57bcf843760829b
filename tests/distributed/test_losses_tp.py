"""Tensor-parallel divergences equal a dense float64 reference, in value and in every gradient."""

from __future__ import annotations

import itertools
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from opd_megatron.losses import linear_divergence, linear_divergence_terms, reduction, vocab_parallel_divergence
from tests.losses.reference import (
    ENSEMBLES,
    KINDS,
    TEMPERATURES,
    dense_divergence,
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
    for (type, beta), temperature, (combine, weights) in itertools.product(KINDS, TEMPERATURES, ENSEMBLES):
        yield type, beta, temperature, combine, weights


def _logits_body(rank: int, ranks: int, vocab_size: int, columns: int) -> float:
    generator = torch.Generator().manual_seed(0)
    full = [3 * torch.randn(T, vocab_size, generator=generator) for _ in range(3)]
    shards = [_shard(pad_columns(x, columns, generator), rank, ranks, 1) for x in full]
    token_weights = torch.rand(T, generator=generator)
    worst = 0.0
    for type, beta, temperature, combine, weights in _cases():
        count = 1 if weights is None else len(weights)
        student = shards[0].clone().requires_grad_()
        loss = vocab_parallel_divergence(
            student, shards[1 : 1 + count], type=type, beta=beta, temperature=temperature, vocab_size=vocab_size,
            group=dist.group.WORLD, teacher_weights=weights, combine=combine,
        )  # fmt: skip
        (loss * token_weights).sum().backward()
        dense = full[0].double().requires_grad_()
        expected = dense_divergence(dense, full[1 : 1 + count], type, beta, temperature, combine, weights)
        (expected * token_weights).sum().backward()
        padded = torch.zeros(T, columns, dtype=torch.float64)
        padded[:, :vocab_size] = dense.grad
        # Errors of a shard are measured against the whole gradient: a rank may hold none of it.
        share = (student.grad.double() - _shard(padded, rank, ranks, 1)).norm() / padded.norm()
        worst = max(worst, relative_error(loss.detach(), expected.detach()), share.item())
    return worst


@pytest.mark.parametrize(("vocab_size", "columns"), PADDING)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_logits_form_equals_dense_float64_reference(ranks: int, vocab_size: int, columns: int) -> None:
    assert max(run_ranks(ranks, _logits_body, vocab_size, columns)) <= 1e-5


def _linear_body(rank: int, ranks: int, vocab_size: int, columns: int, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(1)
    sizes = (H, H, H + 4)
    hidden = [torch.randn(T, h, generator=generator).to(dtype) for h in sizes]
    heads = [(0.7 * torch.randn(vocab_size, h, generator=generator)).to(dtype) for h in sizes]
    shards = [_shard(pad_columns(head, columns, generator, dim=0), rank, ranks, 0) for head in heads]
    token_weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.0, 1.0])
    worst = 0.0
    for index, (type, beta, temperature, combine, weights) in enumerate(_cases()):
        count = 1 if weights is None else len(weights)
        student, head = hidden[0].clone().requires_grad_(), shards[0].clone().requires_grad_()
        loss, per_token = linear_divergence(
            student, head, list(zip(hidden[1 : 1 + count], shards[1 : 1 + count], strict=True)),
            type=type, beta=beta, temperature=temperature, vocab_size=vocab_size, group=dist.group.WORLD,
            teacher_weights=weights, combine=combine, token_weights=token_weights, chunk_tokens=(2, 4, None)[index % 3],
        )  # fmt: skip
        (3 * loss).backward()
        dense = [hidden[0].double().requires_grad_(), heads[0].double().requires_grad_()]
        teachers = [h.double() @ w.double().t() for h, w in zip(hidden[1 : 1 + count], heads[1:], strict=False)]
        expected = dense_divergence(dense[0] @ dense[1].t(), teachers, type, beta, temperature, combine, weights)
        (3 * (expected * token_weights).sum()).backward()
        padded = torch.zeros(columns, H, dtype=torch.float64)
        padded[:vocab_size] = dense[1].grad
        share = (head.grad.double() - _shard(padded, rank, ranks, 0)).norm() / padded.norm()
        worst = max(
            worst, share.item(), relative_error(per_token, expected.detach()),
            relative_error(loss.detach(), (expected * token_weights).sum().detach()),
            relative_error(student.grad, dense[0].grad),
        )  # fmt: skip
    return worst


@pytest.mark.parametrize(("vocab_size", "columns"), PADDING)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_linear_form_equals_dense_float64_reference(ranks: int, vocab_size: int, columns: int) -> None:
    assert max(run_ranks(ranks, _linear_body, vocab_size, columns, torch.float32)) <= 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_linear_form_in_bf16_stays_within_its_rounding(ranks: int) -> None:
    assert max(run_ranks(ranks, _linear_body, 37, 40, torch.bfloat16)) <= 2e-2


def _metrics_body(rank: int, ranks: int) -> float:
    generator = torch.Generator().manual_seed(2)
    hidden = [torch.randn(T, H, generator=generator) for _ in range(2)]
    heads = [torch.randn(19, H, generator=generator) for _ in range(2)]
    shards = [_shard(pad_columns(head, 40, generator, dim=0), rank, ranks, 0) for head in heads]
    targets = torch.randint(19, (T,), generator=generator)
    terms = linear_divergence_terms(
        hidden[0], shards[0], [(hidden[1], shards[1])], type="gkd", beta=0.3, vocab_size=19,
        group=dist.group.WORLD, chunk_tokens=3, targets=targets,
    )  # fmt: skip
    log_p, log_q = ((h.double() @ w.double().t()).log_softmax(-1) for h, w in zip(hidden, heads, strict=True))
    expected = {
        "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "student_entropy": -(log_p.exp() * log_p).sum(-1),
        "teacher_entropy": -(log_q.exp() * log_q).sum(-1),
        "student_logprob": log_p.gather(1, targets[:, None])[:, 0],
        "teacher_logprob": log_q.gather(1, targets[:, None])[:, 0],
    }
    return max(relative_error(getattr(terms, name), value) for name, value in expected.items())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_metrics_of_the_same_pass_equal_the_reference(ranks: int) -> None:
    assert max(run_ranks(ranks, _metrics_body)) <= 1e-5


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


def _blocks_body(rank: int, ranks: int) -> float:
    """The same call with blocks of one row: every stage reads its rows again."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (_shard(3 * torch.randn(T, 40, generator=generator), rank, ranks, 1) for _ in range(2))
    results = []
    for elements in (1, 2**21):
        with mock.patch("opd_megatron.losses.engine._BLOCK_ELEMENTS", {"cpu": elements}):
            logits = student.clone().requires_grad_()
            loss = vocab_parallel_divergence(logits, teacher, type="gkd", temperature=2.0, group=dist.group.WORLD)
            loss.sum().backward()
            results.append(torch.cat([loss.detach(), logits.grad.flatten()]))
    return relative_error(results[0], results[1].double())


@pytest.mark.parametrize("ranks", [1, 2])
def test_result_does_not_depend_on_the_block_size(ranks: int) -> None:
    assert max(run_ranks(ranks, _blocks_body)) <= 1e-6


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
            sums=torch.full((len(reduction.METRIC_NAMES),), float(6 * count if rank == 0 else 2), dtype=torch.float64),
            names=reduction.METRIC_NAMES,
        )
        for count in counts
    ]
    return reduction.global_means(parts, [dist.group.WORLD], torch.device("cpu"))


def test_mean_over_micro_batches_and_ranks_weights_every_token_alike() -> None:
    assert run_ranks(2, _mean_body) == [([20 / 4] * len(reduction.METRIC_NAMES), 4)] * 2
