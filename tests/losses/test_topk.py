"""Top-k teachers: k entries and a tail bucket, in one process. Hard and bad inputs: `test_topk_inputs.py`."""

from __future__ import annotations

import pytest
import torch

from opd_megatron.losses import (
    TopKTeacher,
    linear_divergence,
    linear_divergence_terms,
    reduction,
    vocab_parallel_divergence,
)
from opd_megatron.losses.kernels import use_backend
from opd_megatron.losses.policy import PolicyTerm
from tests.losses.reference import TEMPERATURES, dense_divergence, relative_error
from tests.losses.topk_reference import (
    H,
    T,
    V,
    best_of,
    bucketed_divergence,
    completed,
    every_backend,
    every_kind,
    padded,
    pair,
    value_and_gradient,
)


@every_kind
@every_backend
def test_value_and_gradient_equal_the_bucketed_reference(backend: str, type: str, arguments: dict) -> None:
    student, logits = pair()
    with use_backend(backend):
        for temperature in TEMPERATURES:
            teacher = padded(best_of(logits, 5, temperature), [5, 4, 3, 2, 1, 5, 0, 5, 1])
            loss, gradient = value_and_gradient(student, teacher, type=type, temperature=temperature, **arguments)
            dense = student.double().requires_grad_()
            expected = bucketed_divergence(dense, teacher, type, temperature, **arguments)
            expected.sum().backward()
            assert relative_error(loss, expected.detach()) <= 1e-5
            assert relative_error(gradient, dense.grad) <= 1e-5


@every_kind
def test_gradcheck_in_float64(type: str, arguments: dict) -> None:
    student, logits = (x[:3, :7].double() / 3 for x in pair())
    teacher = best_of(logits[:, :6], 3, 1.3)
    assert torch.autograd.gradcheck(
        lambda s: vocab_parallel_divergence(s, teacher, type=type, temperature=1.3, vocab_size=6, **arguments),
        student.requires_grad_(),
    )


@every_kind
def test_it_is_the_dense_divergence_from_the_teacher_with_the_students_tail(type: str, arguments: dict) -> None:
    student, logits = pair()
    teacher = best_of(logits, 4, 2.0)
    loss, gradient = value_and_gradient(student, teacher, type=type, temperature=2.0, **arguments)
    whole = completed(student, teacher, 2.0).float()
    expected, expected_gradient = value_and_gradient(student, whole, type=type, temperature=2.0, **arguments)
    assert relative_error(loss, expected.double()) <= 1e-5
    assert relative_error(gradient, expected_gradient.double()) <= 1e-5
    # No teacher with these entries is nearer.
    assert (loss <= dense_divergence(student, [logits], type, 2.0, **arguments) + 1e-6).all()


@every_kind
def test_all_entries_make_the_dense_teacher(type: str, arguments: dict) -> None:
    student, logits = pair()
    loss, gradient = value_and_gradient(student, best_of(logits, V), type=type, **arguments)
    expected, expected_gradient = value_and_gradient(student, logits, type=type, **arguments)
    assert relative_error(loss, expected.double()) <= 1e-5
    assert relative_error(gradient, expected_gradient.double()) <= 1e-5


@every_kind
def test_tiny_divergence_keeps_its_digits(type: str, arguments: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    student, noise = (torch.randn(16, 5000, generator=generator) for _ in range(2))
    student = 3 * student
    # A mixture that is nearly one of its parts makes a smaller divergence of the same noise.
    probe = bucketed_divergence(student, best_of(student + 0.015 * noise, 64), type, **arguments).mean()
    teacher = best_of(student + 0.015 * (1e-4 / probe.float()).sqrt() * noise, 64)
    loss, gradient = value_and_gradient(student, teacher, type=type, **arguments)
    dense = student.double().requires_grad_()
    expected = bucketed_divergence(dense, teacher, type, **arguments)
    expected.sum().backward()
    assert 5e-5 < expected.mean().item() < 2e-4
    assert ((loss - expected).abs() / expected).max().item() <= 1e-3
    assert relative_error(gradient, dense.grad) <= 1e-3


@every_kind
def test_tail_columns_are_pulled_by_the_bucket_in_proportion_to_their_probability(type: str, arguments: dict) -> None:
    student, logits = pair()
    teacher = best_of(logits, 5)
    _, gradient = value_and_gradient(student, teacher, type=type, **arguments)
    tail = torch.ones(T, V, dtype=torch.bool).scatter(1, teacher.ids, False)
    log_m_over_p = (gradient / student.softmax(-1))[tail].view(T, -1)
    torch.testing.assert_close(log_m_over_p, log_m_over_p[:, :1].expand_as(log_m_over_p), rtol=1e-4, atol=1e-6)
    # As the gradient leaves a row's sum of logits alone, none of it is lost between entries and tail.
    assert gradient.sum(-1).abs().max() <= 1e-6


def test_a_row_without_entries_teaches_nothing() -> None:
    student, logits = pair()
    loss, gradient = value_and_gradient(student, padded(best_of(logits, 3), [0] * T), type="reverse_kl")
    assert loss.abs().max() <= 1e-7
    assert gradient.abs().max() <= 1e-7


def _drained(share: float) -> tuple[torch.Tensor, TopKTeacher]:
    """A student that keeps `share` of the teacher's mass on the entries, in the teacher's proportions."""
    q = torch.tensor([0.5, 0.3, 0.15])
    p = torch.cat([share * q, torch.full((20,), (1 - share * 0.95) / 20)])
    return p.log().unsqueeze(0), TopKTeacher(torch.arange(3).unsqueeze(0), q.log().unsqueeze(0))


def test_draining_the_entries_never_pays() -> None:
    """Over the entries alone the sum falls from the first step away, and renormalised it stays 0."""
    losses, alone, renormalised = [], [], []
    for share in (1.0, 0.9, 0.7, 0.4, 0.1, 0.01):
        student, teacher = _drained(share)
        losses.append(vocab_parallel_divergence(student, teacher).item())
        log_p, log_q = student[:, :3].double(), teacher.logprobs.double()
        alone.append((log_p.exp() * (log_p - log_q)).sum().item())
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        renormalised.append((log_p.exp() * (log_p - log_q)).sum().item())
    assert alone[:5] != sorted(alone[:5])
    assert min(alone) < 0
    assert max(map(abs, renormalised)) < 1e-6
    assert losses == sorted(losses)
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[-1] > 2


@pytest.mark.parametrize("type", ["reverse_kl", "forward_kl", "gkd"])
def test_descent_returns_drained_mass_to_the_entries(type: str) -> None:
    student, teacher = _drained(0.1)
    for _ in range(300):
        _, gradient = value_and_gradient(student, teacher, type=type)
        student = student - 2 * gradient
    torch.testing.assert_close(student.softmax(-1)[:, :3], teacher.logprobs.exp(), rtol=2e-2, atol=0)


def _hidden(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    head = (0.7 * torch.randn(V + 3, H, generator=generator)).to(dtype).requires_grad_()
    return hidden, head


@every_kind
def test_both_forms_agree(type: str, arguments: dict) -> None:
    (hidden, head), weights = _hidden(), torch.linspace(0, 2, T)
    teacher = best_of(pair()[1], 5, 0.5)
    options = {"type": type, "temperature": 0.5, "vocab_size": V, **arguments}
    loss, per_token = linear_divergence(hidden, head, [teacher], token_weights=weights, chunk_tokens=4, **options)
    gradients = torch.autograd.grad(loss, [hidden, head])
    expected = vocab_parallel_divergence(hidden @ head.t(), [teacher], **options)
    torch.testing.assert_close(per_token, expected.detach())
    expected_gradients = torch.autograd.grad((expected * weights).sum(), [hidden, head])
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, other.double()) <= 1e-5


@every_kind
def test_bf16_student_stays_within_its_rounding(type: str, arguments: dict) -> None:
    hidden, head = _hidden(torch.bfloat16)
    teacher = best_of(pair()[1], 5)
    loss, per_token = linear_divergence(hidden, head, [teacher], type=type, vocab_size=V, **arguments)
    loss.backward()
    dense = [x.detach().double().requires_grad_() for x in (hidden, head)]
    expected = bucketed_divergence(dense[0] @ dense[1][:V].t(), teacher, type, **arguments)
    expected.sum().backward()
    assert relative_error(per_token, expected.detach()) <= 2e-2
    assert relative_error(hidden.grad, dense[0].grad) <= 2e-2
    assert relative_error(head.grad, dense[1].grad) <= 2e-2


@every_backend
def test_metrics_are_of_the_bucketed_distributions(backend: str) -> None:
    student, logits = pair()
    student[:4] = logits[:4] / 2  # these agree on the best token
    teacher, temperature = best_of(logits, 6, 0.7), 0.7
    student[4, teacher.ids[4, 1]] = 20  # prefers the teacher's second
    targets = torch.cat([teacher.ids[:4, 2], torch.arange(4, T)])
    with use_backend(backend):
        terms = linear_divergence_terms(
            student, torch.eye(V), [teacher], type="gkd", beta=0.3, temperature=temperature, targets=targets
        )
    log_p, log_q = ((x.double() / temperature).log_softmax(-1) for x in (student, completed(student, teacher, 0.7)))
    tail = torch.ones(T, V, dtype=torch.bool).scatter(1, teacher.ids, False)
    q_tail = (log_q.exp() * tail).sum(-1)
    expected = {
        "divergence": bucketed_divergence(student, teacher, "gkd", temperature, beta=0.3),
        "reverse_kl": bucketed_divergence(student, teacher, "reverse_kl", temperature),
        "forward_kl": bucketed_divergence(student, teacher, "forward_kl", temperature),
        "student_entropy": -(log_p.exp() * log_p).sum(-1),
        "teacher_entropy": -(log_q.exp() * log_q * ~tail).sum(-1) - q_tail * q_tail.log(),
        "student_logprob": log_p.gather(1, targets[:, None])[:, 0],
        "teacher_logprob": log_q.gather(1, targets[:, None])[:, 0],
        "top1_agreement": (student.argmax(-1) == logits.argmax(-1)).double(),
    }
    assert 0 < expected["top1_agreement"].sum() < T
    assert 0 < tail.gather(1, targets[:, None]).sum() < T
    for name, value in expected.items():
        assert relative_error(getattr(terms, name), value) <= 1e-5, name
    assert reduction.token_sums(terms).num_tokens == T


@pytest.mark.parametrize(
    ("advantage", "type", "arguments"),
    [
        ("kl", "reverse_kl", {}),
        ("jsd", "gkd", {"beta": 0.3}),
        ("lambda_jsd", "lambda_jsd", {"lambda_coef": 0.7}),
    ],
)
def test_expected_gradient_of_an_advantage_is_that_of_the_bucketed_divergence(
    advantage: str, type: str, arguments: dict
) -> None:
    """Every token of the vocabulary is sampled once and weighs its probability."""
    student, logits = (x[:1] for x in pair())
    teacher = best_of(logits, 5, 2.0)
    fused = TopKTeacher(teacher.ids.expand(V, -1), teacher.logprobs.expand(V, -1))
    log_p = (student / 2.0).log_softmax(-1)[0]
    hidden = student.expand(V, V).clone().requires_grad_()
    term = PolicyTerm(log_p, advantage=advantage, coef=1.0, **arguments)
    loss = linear_divergence_terms(
        hidden, torch.eye(V), [fused], temperature=2.0, lambda_distill=0.0, token_weights=log_p.exp(),
        targets=torch.arange(V), policy=term,
    ).loss_sum  # fmt: skip
    loss.backward()
    actual = hidden.grad.sum(0).double()
    dense = student.double().requires_grad_()
    bucketed_divergence(dense, teacher, type, 2.0, **arguments).sum().backward()
    assert torch.nn.functional.cosine_similarity(actual, dense.grad[0], dim=0) >= 0.9999
    assert relative_error(actual, dense.grad[0]) <= 1e-4


@every_backend
def test_divergence_and_policy_in_one_pass_equal_their_sum(backend: str) -> None:
    student, logits = pair()
    teacher, temperature = best_of(logits, 5, 0.5), 0.5
    targets = torch.cat([teacher.ids[:4, 1], torch.arange(4, T)])
    generator = torch.Generator().manual_seed(5)
    given, rollout = torch.randn(T, generator=generator), -3 * torch.rand(T, generator=generator)
    hidden = student.clone().requires_grad_()
    with use_backend(backend):
        terms = linear_divergence_terms(
            hidden, torch.eye(V), [teacher], type="gkd", beta=0.4, temperature=temperature, lambda_distill=0.6,
            targets=targets, policy=PolicyTerm(rollout, coef=0.8, advantage="kl", advantages=given, kl_coef=0.5),
        )  # fmt: skip
    terms.loss_sum.backward()
    dense = student.double().requires_grad_()
    log_p = (dense / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    log_q = (completed(student, teacher, temperature) / temperature).gather(1, targets[:, None])[:, 0]
    advantages = given + 0.5 * (log_q - rollout)
    policy = -(log_p - rollout).exp() * advantages
    expected = 0.6 * bucketed_divergence(dense, teacher, "gkd", temperature, beta=0.4) + 0.8 * policy
    expected.sum().backward()
    assert relative_error(terms.per_token, expected.detach()) <= 1e-5
    assert relative_error(hidden.grad, dense.grad) <= 1e-5
