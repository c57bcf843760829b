"""Top-k teachers, hard and bad inputs: unresolved tails, one-hot teachers, masks, memory, arguments that do not fit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_megatron.errors import ConfigError
from opd_megatron.losses import TopKTeacher, linear_divergence, vocab_parallel_divergence
from opd_megatron.losses.kernels import use_backend
from tests.losses.reference import relative_error
from tests.losses.topk_reference import (
    H,
    T,
    V,
    best_of,
    bucketed_divergence,
    every_backend,
    every_kind,
    pair,
    value_and_gradient,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tail_below_resolution_is_set_to_it(dtype: torch.dtype) -> None:
    logprobs = torch.tensor([[math.log(0.6), math.log(0.4)]], dtype=torch.float64)
    student = torch.tensor([[1.0, 1.0, 0.0, -1.0]])
    ids = torch.tensor([[0, 1]])
    log_p = student.double().log_softmax(-1)
    p, p_tail = log_p[:, :2], log_p[:, 2:].logsumexp(-1)
    entries = logprobs.to(dtype)
    resolution = 2**-23 + torch.finfo(dtype).eps / 2 * torch.special.entr(entries.double().exp()).sum(-1)
    q_tail = resolution.maximum(1 - entries.double().exp().sum(-1))
    expected = (p.exp() * (p - entries.double())).sum(-1) + p_tail.exp() * (p_tail - q_tail.log())
    # The value has the generalised form, sum q - p added: a mass that rounds to other than 1 does not matter.
    expected = expected + entries.double().exp().sum(-1) + q_tail - 1
    for tail in (None, torch.tensor([-math.inf])):
        loss = vocab_parallel_divergence(student, TopKTeacher(ids, entries, tail))
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_tail_that_is_given_is_believed() -> None:
    student, logits = pair()
    teacher = best_of(logits, 3)
    tail = torch.full((T,), -30.0)
    sharp = TopKTeacher(teacher.ids, teacher.logprobs.double().log_softmax(-1).float(), tail)
    for type in ("reverse_kl", "forward_kl"):
        loss, gradient = value_and_gradient(student, sharp, type=type)
        dense = student.double().requires_grad_()
        expected = bucketed_divergence(dense, sharp, type)
        expected.sum().backward()
        assert relative_error(loss, expected.detach()) <= 1e-5
        assert relative_error(gradient, dense.grad) <= 1e-5


@every_kind
@every_backend
def test_one_hot_teachers_and_huge_logits_are_finite_and_right(backend: str, type: str, arguments: dict) -> None:
    student = torch.tensor([[1e4, -1e4, 0, 5], [1e4, 1e4, -1e4, -1e4], [-1e4, 1e4, 3, 2], [2, 2, 2, 2], [5, 1, 2, 3]])
    student[4, 3] = -math.inf  # a tail column
    never = -math.inf
    ids = torch.tensor([[2, -1], [3, -1], [1, 0], [0, -1], [0, -1]])
    logprobs = torch.tensor([[0, never], [0, never], [-1e-3, -10], [0, never], [-0.5, never]])
    with use_backend(backend):
        loss, gradient = value_and_gradient(student, TopKTeacher(ids, logprobs), type=type, **arguments)
    resolved = (1 - logprobs.double().exp().sum(-1)).clamp(min=2**-23)
    dense = student.double().clamp(min=-1e5).requires_grad_()  # 0 * inf is no number, 0 * 1e5 is 0
    expected = bucketed_divergence(dense, TopKTeacher(ids, logprobs, resolved.log()), type, **arguments)
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), dense.grad, rtol=1e-4, atol=2e-6)


def test_an_entry_of_probability_zero_counts_as_a_dense_teachers_would() -> None:
    student, logits = pair()
    student[:, 7], logits[:, 7] = 0, -math.inf
    entries = best_of(logits, V)
    for type, infinite in (("reverse_kl", True), ("forward_kl", False), ("gkd", False)):
        loss, gradient = value_and_gradient(student, entries, type=type)
        expected, expected_gradient = value_and_gradient(student, logits, type=type)
        assert loss.isinf().all() == infinite
        torch.testing.assert_close(loss, expected)
        if not infinite:
            assert relative_error(gradient, expected_gradient.double()) <= 1e-5


def test_masked_tokens_take_no_part_whatever_they_hold() -> None:
    student, logits = pair()
    teacher = best_of(logits, 4)
    teacher.logprobs[0, 3], mask = -math.inf, torch.ones(T)  # reverse KL of token 0 is infinite
    mask[0] = 0
    hidden, head = student.clone().requires_grad_(), torch.eye(V, requires_grad=True)
    loss, per_token = linear_divergence(hidden, head, [teacher], token_weights=mask)
    loss.backward()
    assert per_token[0] == math.inf
    kept = TopKTeacher(teacher.ids[1:], teacher.logprobs[1:])
    torch.testing.assert_close(loss, vocab_parallel_divergence(student[1:], kept).sum())
    assert hidden.grad[0].abs().max() == 0
    assert head.grad.isfinite().all()
    nothing, _ = linear_divergence(hidden, head, [teacher], token_weights=torch.zeros(T))
    gradients = torch.autograd.grad(nothing, [hidden, head])
    assert nothing.item() == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_a_micro_batch_without_tokens_costs_nothing() -> None:
    nothing = TopKTeacher(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
    hidden, head = torch.zeros(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    loss, per_token = linear_divergence(hidden, head, [nothing])
    loss.backward()
    assert loss.item() == 0
    assert per_token.shape == (0,)
    assert head.grad.abs().max() == 0
    assert vocab_parallel_divergence(torch.zeros(0, V), nothing).shape == (0,)


_IDS, _LOGPROBS = torch.tensor([[1, 2, 3]] * T), torch.tensor([[-1.0, -2.0, -3.0]] * T)


def _changed(values: torch.Tensor, entry: float) -> torch.Tensor:
    values = values.clone()
    values[2, 1] = entry
    return values


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ids": _IDS.int()}, "int64"),
        ({"ids": _IDS[:, :2]}, "one shape"),
        ({"ids": _IDS[:, :0], "logprobs": _LOGPROBS[:, :0]}, "k >= 1"),
        ({"ids": _IDS[0]}, "[T, k]"),
        ({"ids": [[1, 2, 3]] * T}, "list"),
        ({"ids": _IDS[1:]}, "8 rows"),
        ({"ids": _IDS.to("meta")}, "meta"),
        ({"ids": _changed(_IDS, V)}, "row 2"),
        ({"ids": _changed(_IDS, -2)}, "outside"),
        ({"ids": _changed(_IDS, 3)}, "twice"),
        ({"ids": _changed(_IDS, -1)}, "-inf"),
        ({"logprobs": _IDS}, "floating"),
        ({"logprobs": _changed(_LOGPROBS, -0.3)}, "mass of 1.1"),
        ({"logprobs": _changed(_LOGPROBS, math.nan)}, "mass"),
        ({"logprobs": -_LOGPROBS}, "not logits"),
        ({"tail_logprob": torch.zeros(T, 1)}, "[T]"),
        ({"tail_logprob": torch.zeros(T)}, "mass"),
        ({"tail_logprob": torch.full((T,), -9.0)}, "mass"),
        ({"tail_logprob": torch.full((T - 1,), -9.0)}, "8 rows"),
    ],
)
def test_bad_entries_raise_one_line_with_value_rule_and_remedy(fields: dict, words: str) -> None:
    teacher = TopKTeacher(**({"ids": _IDS, "logprobs": _LOGPROBS} | fields))
    for call in (
        lambda: vocab_parallel_divergence(torch.zeros(T, V), teacher),
        lambda: linear_divergence(torch.zeros(T, H), torch.zeros(V, H), [teacher]),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        message = str(error.value)
        assert words in message
        assert "\n" not in message
        assert ":" in message


def test_a_row_that_covers_the_vocabulary_must_sum_to_one() -> None:
    teacher = best_of(pair()[1], V)
    short = TopKTeacher(teacher.ids, teacher.logprobs - 0.1)
    with pytest.raises(ConfigError, match="a mass of 0"):
        vocab_parallel_divergence(torch.zeros(T, V), short)


def test_an_ensemble_with_a_topk_teacher_is_refused() -> None:
    student, logits = pair()
    for teachers in ([best_of(logits, 3), logits], [best_of(logits, 3)] * 2):
        with pytest.raises(ConfigError, match="alone"):
            vocab_parallel_divergence(student, teachers)
    with pytest.raises(ConfigError, match="alone"):
        linear_divergence(student, torch.eye(V), [(student, torch.eye(V)), best_of(logits, 3)])


class _LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_linear_form_never_holds_logits_of_all_tokens() -> None:
    tokens, columns, chunk = 64, 3000, 8
    hidden, head = torch.randn(tokens, 4, requires_grad=True), torch.randn(columns, 4, requires_grad=True)
    teacher = best_of(torch.randn(tokens, columns), 5)
    with _LargestTensor() as largest:
        linear_divergence(hidden, head, [teacher], chunk_tokens=chunk)[0].backward()
    buffers = 6  # of one block, allocated together
    assert largest.elements <= buffers * chunk * columns < tokens * columns


def test_inputs_stay_untouched_and_no_gradient_needs_no_graph() -> None:
    student, logits = pair()
    teacher = best_of(logits, 3)
    before = [x.clone() for x in (student, teacher.ids, teacher.logprobs)]
    loss = vocab_parallel_divergence(student, teacher)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, value_and_gradient(student, teacher)[0])
    assert all(torch.equal(x, y) for x, y in zip(before, (student, teacher.ids, teacher.logprobs), strict=True))
