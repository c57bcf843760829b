"""Hard inputs: masks, extreme logits, tiny divergences, bounded memory, bad arguments. One process."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_megatron.losses import linear_divergence, linear_divergence_terms, vocab_parallel_divergence
from opd_megatron.losses.kernels import use_backend
from opd_megatron.losses.reduction import global_means, token_sums
from tests.losses.reference import KINDS, NAMES, dense_divergence, relative_error

every_kind = pytest.mark.parametrize(("type", "arguments"), KINDS, ids=NAMES)


@pytest.fixture(autouse=True, params=["torch", "compiled"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of this file holds for both backends of a CPU."""
    with use_backend(request.param):
        yield request.param


def _value_and_gradient(student, teacher, **arguments):
    student = student.clone().requires_grad_()
    loss = vocab_parallel_divergence(student, teacher, **arguments)
    loss.sum().backward()
    return loss.detach(), student.grad


@every_kind
def test_gradcheck_in_float64(type: str, arguments: dict) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.randn(3, 6).double()
    assert torch.autograd.gradcheck(
        lambda s: vocab_parallel_divergence(s, teacher, type=type, **arguments, temperature=1.3, vocab_size=5), student
    )


@every_kind
def test_tiny_divergence_keeps_its_digits(type: str, arguments: dict) -> None:
    torch.manual_seed(0)
    student, noise = 3 * torch.randn(16, 5000), torch.randn(16, 5000)
    # A mixture that is nearly one of its parts makes a smaller divergence of the same noise.
    probe = dense_divergence(student, [student + 0.015 * noise], type, **arguments).mean()
    teacher = student + 0.015 * (1e-4 / probe.float()).sqrt() * noise
    loss, gradient = _value_and_gradient(student, teacher, type=type, **arguments)
    dense = student.double().requires_grad_()
    expected = dense_divergence(dense, [teacher], type, **arguments)
    expected.sum().backward()
    assert 5e-5 < expected.mean().item() < 2e-4
    assert ((loss - expected).abs() / expected).max().item() <= 1e-3
    assert relative_error(gradient, dense.grad) <= 1e-3


@every_kind
def test_equal_models_have_no_divergence_and_no_gradient(type: str, arguments: dict) -> None:
    logits = torch.full((2, 9), 7.0)
    for student in (logits, torch.randn(2, 9)):
        loss, gradient = _value_and_gradient(student, student.clone(), type=type, **arguments)
        assert loss.abs().max() <= 1e-7
        assert gradient.abs().max() <= 1e-7


@every_kind
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_huge_logits_and_one_hot_teachers_match_the_reference(type: str, arguments: dict, temperature: float) -> None:
    huge = torch.tensor([[1e4, -1e4, 0, 5], [1e4, 1e4, -1e4, -1e4], [-1e4, 1e4, 3, 2], [1, 2, 3, 4]])
    teacher = torch.tensor([[1, 2, 3, 4], [-1e4, 1e4, -1e4, -1e4], [1e4, -1e4, -1e4, -1e4], [1e4, -1e4, -1e4, -1e4]])
    mixed = arguments.get("forward_weight", 0.0)
    loss, gradient = _value_and_gradient(huge, teacher, type=type, **arguments, temperature=temperature)
    dense = huge.double().requires_grad_()
    expected = dense_divergence(dense, [teacher], type, temperature, **arguments)
    (df_dp,) = torch.autograd.grad(expected.sum(), dense)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    # Of a sum of addends near 1e4 and near 1, fp32 keeps what it can.
    torch.testing.assert_close(gradient.double(), df_dp, rtol=1e-4, atol=4e-3 if 0 < mixed < 1 else 2e-6)


@every_kind
def test_column_impossible_under_both_models_changes_nothing(type: str, arguments: dict) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 8), torch.randn(3, 8)
    expected, expected_gradient = _value_and_gradient(student, teacher, type=type, **arguments)
    never = torch.full((3, 1), -math.inf)
    loss, gradient = _value_and_gradient(
        torch.cat([student, never], 1), torch.cat([teacher, never], 1), type=type, **arguments
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[:, :8], expected_gradient)
    assert (gradient[:, 8] == 0).all()


def test_column_impossible_under_one_model_is_infinite_only_where_mathematics_says_so() -> None:
    finite, never = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, -math.inf]])
    loss, gradient = _value_and_gradient(never, finite, type="reverse_kl")
    log_p, log_q = never.log_softmax(-1)[0, :2], finite.log_softmax(-1)[0, :2]
    torch.testing.assert_close(loss[0], (log_p.exp() * (log_p - log_q)).sum())
    assert gradient.isfinite().all()
    assert vocab_parallel_divergence(never, finite, type="forward_kl").item() == math.inf
    assert vocab_parallel_divergence(finite, never, type="reverse_kl").item() == math.inf
    assert vocab_parallel_divergence(finite, never, type="gkd").isfinite().all()


def _random_pair(tokens: int = 10, h: int = 8, columns: int = 30):
    torch.manual_seed(0)
    student = torch.randn(tokens, h, requires_grad=True), torch.randn(columns, h, requires_grad=True)
    return student, (torch.randn(tokens, h), torch.randn(columns, h))


def test_all_tokens_masked_gives_zero_loss_and_zero_gradients() -> None:
    (hidden, head), teacher = _random_pair()
    loss, _ = linear_divergence(hidden, head, [teacher], token_weights=torch.zeros(10), chunk_tokens=3)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == 0
    assert head.grad.abs().max() == 0


def test_masked_token_does_not_matter_even_where_its_divergence_is_infinite() -> None:
    (hidden, head), (states, weight) = _random_pair()
    with torch.no_grad():
        states[0] = 1e30  # teacher logits beyond every bound
    mask = torch.ones(10)
    mask[0] = 0
    loss, _ = linear_divergence(hidden, head, [(states, weight)], token_weights=mask)
    loss.backward()
    kept, _ = linear_divergence(hidden[1:], head, [(states[1:], weight)])
    torch.testing.assert_close(loss, kept)
    assert hidden.grad.isfinite().all()
    assert hidden.grad[0].abs().max() == 0


def test_tied_head_receives_the_sum_of_both_gradients() -> None:
    (_, head), teacher = _random_pair()
    tokens = torch.arange(10)
    loss, _ = linear_divergence(head[tokens], head, [teacher], chunk_tokens=4)
    loss.backward()
    dense = head.detach().double().requires_grad_()
    logits = teacher[0].double() @ teacher[1].double().t()
    dense_divergence(dense[tokens] @ dense.t(), [logits], "reverse_kl").sum().backward()
    assert relative_error(head.grad, dense.grad) <= 1e-5


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_only_what_needs_a_gradient_gets_one_and_inputs_stay_untouched(frozen: str) -> None:
    (hidden, head), teacher = _random_pair()
    before = [x.detach().clone() for x in (hidden, head, *teacher)]
    linear_divergence(hidden, head, [teacher])[0].backward()
    expected = {"hidden": hidden.grad, "head": head.grad}
    parts = {"hidden": hidden.detach().requires_grad_(), "head": head.detach().requires_grad_()}
    parts[frozen].requires_grad_(False)
    linear_divergence(parts["hidden"], parts["head"], [teacher])[0].backward()
    (free,) = set(parts) - {frozen}
    torch.testing.assert_close(parts[free].grad, expected[free])
    assert parts[frozen].grad is None
    assert all(torch.equal(x, y) for x, y in zip((hidden, head, *teacher), before, strict=True))


def test_gradients_can_be_taken_twice_from_one_graph() -> None:
    (hidden, head), teacher = _random_pair()
    loss, _ = linear_divergence(hidden, head, [teacher])
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, [hidden, head])[0]
    torch.testing.assert_close(twice, 2 * once)


class _LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_form_never_holds_logits_of_all_tokens(dtype: torch.dtype) -> None:
    tokens, h, columns, chunk = 64, 4, 3000, 8
    hidden = torch.randn(tokens, h).to(dtype).requires_grad_()
    head = torch.randn(columns, h).to(dtype).requires_grad_()
    teacher = torch.randn(tokens, h).to(dtype), torch.randn(columns, h).to(dtype)
    with _LargestTensor() as largest:
        linear_divergence(hidden, head, [teacher], chunk_tokens=chunk)[0].backward()
    buffers = 6  # of one block, allocated together
    assert largest.elements <= buffers * chunk * columns < tokens * columns


def test_no_gradient_work_without_gradients() -> None:
    (hidden, head), teacher = _random_pair()
    with torch.no_grad():
        terms = linear_divergence_terms(hidden, head, [teacher])
    assert not terms.loss_sum.requires_grad
    expected, per_token = linear_divergence(hidden, head, [teacher])
    torch.testing.assert_close(terms.loss_sum, expected.detach())
    assert expected.requires_grad
    assert not per_token.requires_grad


def test_token_sums_follow_the_megatron_contract() -> None:
    (hidden, head), teacher = _random_pair()
    weights = torch.tensor([1.0, 0.0] * 5)
    targets = torch.arange(10)
    terms = linear_divergence_terms(hidden, head, [teacher], token_weights=weights, targets=targets)
    result = token_sums(terms, weights)
    assert result.num_tokens.dtype == torch.int64
    assert result.num_tokens.item() == 5
    assert result.loss_sum is terms.loss_sum
    values, tokens = global_means([result], [], torch.device("cpu"))
    means = dict(zip(result.names, values, strict=True))
    assert tokens == 5
    log_p = (hidden @ head.t()).log_softmax(-1)
    assert means["nll"] == pytest.approx(-log_p[targets, targets][::2].mean().item(), rel=1e-5)
    assert means["loss"] == pytest.approx(means["reverse_kl"], rel=1e-6)
    assert means["loss"] == pytest.approx(terms.per_token[::2].mean().item(), rel=1e-6)
    nothing, tokens = global_means([], [], torch.device("cpu"))
    assert set(nothing) == {0.0}
    assert tokens == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"type": "kl"}, "reverse_kl"),
        ({"beta": -0.1}, "[0, 1]"),
        ({"beta": math.nan}, "[0, 1]"),
        ({"alpha": 1.0}, "alpha=1"),
        ({"lambda_coef": 1.5}, "[0, 1]"),
        ({"lambda_distill": -1.0}, "not negative"),
        ({"temperature": 0}, "positive"),
        ({"temperature": math.inf}, "positive"),
        ({"combine": "vote"}, "prob_mean"),
        ({"teacher_weights": [0.5, 0.5]}, "teacher_weights"),
        ({"teacher_weights": [-1.0]}, "positive"),
        ({"vocab_size": 31}, "vocab_size=31"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"group": "tp"}, "group"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"token_weights": torch.ones(9)}, "token_weights"),
        ({"targets": torch.zeros(10)}, "int64"),
        ({"targets": torch.full((10,), 30)}, "targets"),
        ({"teachers": []}, "teachers"),
        ({"teachers": [(torch.zeros(9, 8), torch.zeros(30, 8))]}, "9 rows"),
        ({"teachers": [(torch.zeros(10, 7), torch.zeros(30, 8))]}, "hidden size 7"),
        ({"teachers": [(torch.zeros(10, 8).bfloat16(), torch.zeros(30, 8))]}, "bfloat16"),
        ({"teachers": [(torch.zeros(10, 8), torch.zeros(29, 8))]}, "29 columns"),
        ({"teachers": (torch.zeros(10, 8), torch.zeros(30, 8))}, "pairs"),
        ({"student_hidden": torch.zeros(2, 5, 8)}, "2-D"),
        ({"student_hidden": torch.zeros(10, 8, dtype=torch.int64)}, "floating"),
        ({"student_head": torch.zeros(30, 8, device="meta")}, "meta"),
    ],
)
def test_bad_arguments_raise_one_line_with_value_rule_and_remedy(change: dict, words: str) -> None:
    (hidden, head), teacher = _random_pair()
    arguments = {"student_hidden": hidden, "student_head": head, "teachers": [teacher], "type": "gkd"} | change
    with pytest.raises(ValueError) as error:
        linear_divergence_terms(**arguments)
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert ":" in message


def test_teachers_with_other_padding_are_accepted_when_one_rank_holds_the_vocabulary() -> None:
    student, teacher = torch.randn(3, 40), torch.randn(3, 50)
    loss = vocab_parallel_divergence(student, teacher, vocab_size=38)
    expected = dense_divergence(student[:, :38], [teacher[:, :38]], "reverse_kl")
    assert relative_error(loss, expected) <= 1e-5
