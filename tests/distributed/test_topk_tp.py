"""Top-k teachers under tensor parallelism: value, gradient and metrics equal the dense bucketed reference."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from opd_megatron.losses import TopKTeacher, linear_divergence, linear_divergence_terms, vocab_parallel_divergence
from opd_megatron.losses.policy import PolicyTerm
from tests.losses.reference import EVENT_KINDS, TEMPERATURES, Errors, failures, pad_columns, relative_error
from tests.losses.topk_reference import best_of, bucketed_divergence, completed, padded
from tests.ranks import run_ranks

T, H = 8, 12
PADDING = ((40, 40), (37, 40), (19, 40))
"""True vocabulary and columns over all ranks: none, a part of the last rank, whole ranks (at TP 2 and 4)."""


def _shard(matrix: torch.Tensor, rank: int, ranks: int, dim: int) -> torch.Tensor:
    return matrix.chunk(ranks, dim)[rank].contiguous()


def _teachers(logits: torch.Tensor, temperature: float) -> dict[str, TopKTeacher]:
    """By where the entries lie."""
    vocab_size = logits.shape[1]
    log_q = (logits.double() / temperature).log_softmax(-1).float()
    first = torch.arange(6).expand(T, -1)
    return {
        "anywhere, rows of any length": padded(best_of(logits, 5, temperature), [5, 4, 3, 2, 1, 0, 5, 1]),
        "all on the first rank": TopKTeacher(first, log_q[:, :6]),
        "all of the first ranks' columns": TopKTeacher(
            torch.arange(vocab_size - 3).expand(T, -1), log_q[:, : vocab_size - 3]
        ),
        "the whole vocabulary": best_of(logits, vocab_size, temperature),
    }


def _logits_body(rank: int, ranks: int, vocab_size: int, columns: int) -> Errors:
    generator = torch.Generator().manual_seed(0)
    full, logits = (3 * torch.randn(T, vocab_size, generator=generator) for _ in range(2))
    shard = _shard(pad_columns(full, columns, generator), rank, ranks, 1)
    weights = torch.rand(T, generator=generator)
    errors: Errors = {}
    for temperature in TEMPERATURES:
        for place, teacher in _teachers(logits, temperature).items():
            for type, arguments in EVENT_KINDS:
                student = shard.clone().requires_grad_()
                loss = vocab_parallel_divergence(
                    student, teacher, type=type, temperature=temperature, vocab_size=vocab_size,
                    group=dist.group.WORLD, **arguments,
                )  # fmt: skip
                (loss * weights).sum().backward()
                dense = full.double().requires_grad_()
                expected = bucketed_divergence(dense, teacher, type, temperature, **arguments)
                (expected * weights).sum().backward()
                whole = torch.zeros(T, columns, dtype=torch.float64)
                whole[:, :vocab_size] = dense.grad
                # Errors of a shard are measured against the whole gradient: a rank may hold none of it.
                share = (student.grad.double() - _shard(whole, rank, ranks, 1)).norm() / whole.norm()
                case = f"{type} {arguments or ''} at temperature {temperature}, entries {place}"
                errors[f"{case}: loss"] = relative_error(loss.detach(), expected.detach())
                errors[f"{case}: d student"] = share.item()
    return errors


@pytest.mark.parametrize(("vocab_size", "columns"), PADDING)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_logits_form_equals_the_bucketed_reference(ranks: int, vocab_size: int, columns: int) -> None:
    assert not failures(run_ranks(ranks, _logits_body, vocab_size, columns), 1e-5)


def _linear_body(rank: int, ranks: int, dtype: torch.dtype, sharded: bool) -> Errors:
    """Divergence, policy term, masks and metrics in one pass."""
    generator = torch.Generator().manual_seed(1)
    vocab_size, columns, temperature = 37, 40, 0.5
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    head = (0.5 * torch.randn(vocab_size, H, generator=generator)).to(dtype)
    teacher = best_of(3 * torch.randn(T, vocab_size, generator=generator), 5, temperature)
    targets = torch.cat([teacher.ids[:4, 1], torch.arange(T - 4) * 9])
    rollout, weights = -3 * torch.rand(T, generator=generator), torch.tensor([1.0, 0, 0.5, 2] * 2)
    split = ranks if sharded else 1
    student = _shard(hidden, rank % split, split, 0).requires_grad_()
    mine = _shard(pad_columns(head, columns, generator, dim=0), rank, ranks, 0).requires_grad_()
    terms = linear_divergence_terms(
        student, mine, [teacher], type="gkd", beta=0.3, temperature=temperature, vocab_size=vocab_size,
        group=dist.group.WORLD, lambda_distill=0.6, token_weights=weights, chunk_tokens=3, targets=targets,
        policy=PolicyTerm(rollout, coef=0.8, advantage="kl"), gather_index=torch.arange(T) if sharded else None,
    )  # fmt: skip
    terms.loss_sum.backward()
    dense = [x.detach().double().requires_grad_() for x in (hidden, head)]
    logits = dense[0] @ dense[1].t()
    log_p = (logits / temperature).log_softmax(-1)
    log_q = (completed(logits.detach(), teacher, temperature) / temperature).gather(1, targets[:, None])[:, 0]
    at_targets = log_p.gather(1, targets[:, None])[:, 0]
    divergence = bucketed_divergence(logits, teacher, "gkd", temperature, beta=0.3)
    expected = 0.6 * divergence - 0.8 * (at_targets - rollout).exp() * (log_q - rollout)
    (expected * weights).sum().backward()
    whole = torch.zeros(columns, H, dtype=torch.float64)
    whole[:vocab_size] = dense[1].grad
    errors = {
        "per token": relative_error(terms.per_token, expected.detach()),
        "d hidden": relative_error(student.grad, _shard(dense[0].grad, rank % split, split, 0)),
        "d head": ((mine.grad.double() - _shard(whole, rank, ranks, 0)).norm() / whole.norm()).item(),
    }
    metrics = {
        "reverse_kl": bucketed_divergence(logits, teacher, "reverse_kl", temperature),
        "forward_kl": bucketed_divergence(logits, teacher, "forward_kl", temperature),
        "student_entropy": -(log_p.exp() * log_p).sum(-1),
        "student_logprob": at_targets,
        "teacher_logprob": log_q,
        "top1_agreement": (logits.argmax(-1) == teacher.ids[:, 0]).double(),
    }
    return errors | {name: relative_error(getattr(terms, name), value.detach()) for name, value in metrics.items()}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_linear_form_with_policy_and_metrics_equals_the_reference(ranks: int, sharded: bool) -> None:
    assert not failures(run_ranks(ranks, _linear_body, torch.float32, sharded), 1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_linear_form_in_bf16_stays_within_its_rounding(ranks: int) -> None:
    assert not failures(run_ranks(ranks, _linear_body, torch.bfloat16, False), 2e-2)


def _collectives_body(rank: int, ranks: int, columns: int, k: int) -> list[tuple[str, int]]:
    student = torch.randn(T, columns, requires_grad=True)
    teacher = best_of(torch.randn(T, ranks * columns, generator=torch.Generator().manual_seed(0)), k)
    calls: list[tuple[str, int]] = []

    def counted(name: str):
        original = getattr(dist, name)

        def call(tensor, *args, **kwargs):
            calls.append((name, tensor.numel()))
            return original(tensor, *args, **kwargs)

        return mock.patch.object(dist, name, call)

    with counted("all_reduce"), counted("all_gather_into_tensor"), counted("broadcast"), counted("all_gather"):
        loss = vocab_parallel_divergence(student, teacher, type="gkd", group=dist.group.WORLD)
        loss.sum().backward()
    return calls


def test_two_collectives_whose_size_knows_neither_k_nor_the_vocabulary() -> None:
    small, large = (run_ranks(2, _collectives_body, columns, k) for columns, k in ((8, 2), (2048, 500)))
    assert [name for name, _ in small[0]] == ["all_gather_into_tensor", "all_reduce"]
    assert all(size <= 10 * T for _, size in small[0])
    assert all(calls == small[0] for calls in small + large)


def _validation_body(rank: int, ranks: int) -> list[str]:
    student, good = torch.zeros(T, 20), best_of(torch.randn(T, 38, generator=torch.Generator().manual_seed(0)), 3)
    twice, outside = good.ids.clone(), good.ids.clone()
    twice[1, 0], outside[2, 0] = twice[1, 1], 38
    teachers = (
        TopKTeacher(twice, good.logprobs),
        TopKTeacher(outside, good.logprobs),
        TopKTeacher(good.ids, good.logprobs + 2),
        TopKTeacher(good.ids[:3], good.logprobs[:3]),
        [good, good],
    )
    messages = []
    refused = AssertionError("a collective was made")
    with mock.patch.object(dist, "all_gather_into_tensor", side_effect=refused):
        for teacher in teachers:
            with pytest.raises(ValueError) as error:
                vocab_parallel_divergence(student, teacher, vocab_size=38, group=dist.group.WORLD)
            messages.append(str(error.value).split(":")[-1])
            with pytest.raises(ValueError):
                linear_divergence(
                    torch.zeros(T, H), torch.zeros(20, H), teacher if isinstance(teacher, list) else [teacher],
                    vocab_size=38, group=dist.group.WORLD,
                )  # fmt: skip
    return messages


def test_bad_entries_raise_on_every_rank_before_any_collective() -> None:
    first, second = run_ranks(2, _validation_body)
    assert first == second
    assert len(set(first)) == len(first)
