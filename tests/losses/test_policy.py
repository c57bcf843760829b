"""Sampled-token terms: what they mean, what they cost, what they refuse. One process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from opd_megatron.losses import PolicyTerm, linear_divergence_terms
from opd_megatron.losses.core.chunks import chunk_bounds
from opd_megatron.losses.kernels import use_backend
from tests.losses.policy_reference import dense_policy_loss
from tests.losses.reference import dense_divergence, relative_error

T, V = 5, 9


@pytest.fixture(autouse=True, params=["torch", "compiled"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def _logits(seed: int = 0, dtype: torch.dtype = torch.float64, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(tokens, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def _terms(student: torch.Tensor, teacher: torch.Tensor, **arguments):
    """The linear form with logits as hidden states."""
    identity = torch.eye(V, dtype=student.dtype)
    return linear_divergence_terms(student, identity, [(teacher, identity)], **arguments)


EXPECTATIONS = [
    ({"advantage": "kl"}, "reverse_kl", {}),
    ({"advantage": "kl", "kl_coef": 0.3}, "reverse_kl", {}),
    *(({"advantage": "jsd", "beta": beta}, "gkd", {"beta": beta}) for beta in (0.1, 0.5, 0.9)),
    *(({"advantage": "lambda_jsd", "lambda_coef": x}, "lambda_jsd", {"lambda_coef": x}) for x in (0.0, 0.3, 0.5, 1.0)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("options", "type", "arguments"), EXPECTATIONS)
def test_expected_gradient_of_an_advantage_is_the_gradient_of_its_divergence(
    options: dict, type: str, arguments: dict, dtype: torch.dtype
) -> None:
    student, teacher = _logits(dtype=dtype)
    log_p = student.double().log_softmax(-1)
    expectation = torch.zeros(T, V, dtype=torch.float64)
    for token in range(V):
        logits = student.clone().requires_grad_()
        policy = PolicyTerm(log_p[:, token].to(dtype), **options)
        terms = _terms(logits, teacher, lambda_distill=0.0, targets=torch.full((T,), token), policy=policy)
        terms.loss_sum.backward()
        expectation += log_p[:, token, None].exp() * logits.grad.double()
    dense = student.double().requires_grad_()
    dense_divergence(dense, [teacher], type, **arguments).sum().backward()
    of_divergence = options.get("kl_coef", 1.0) * dense.grad
    cosine = torch.nn.functional.cosine_similarity(expectation.flatten(), of_divergence.flatten(), dim=0)
    assert cosine >= 0.9999
    assert relative_error(expectation, of_divergence) <= (1e-10 if dtype == torch.float64 else 1e-5)


def test_a_stale_sample_is_reweighted_so_that_the_expected_gradient_stays_the_same() -> None:
    """Sampled from another policy: with the ratio to it, sum p_roll(a) gradient(a) is that of the divergence still."""
    student, teacher = _logits()
    stale = (student + torch.randn(T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(9))).log_softmax(
        -1
    )
    expectation = torch.zeros(T, V, dtype=torch.float64)
    for token in range(V):
        logits = student.clone().requires_grad_()
        policy = PolicyTerm(stale[:, token], advantage="jsd")
        terms = _terms(logits, teacher, lambda_distill=0.0, targets=torch.full((T,), token), policy=policy)
        terms.loss_sum.backward()
        expectation += stale[:, token, None].exp() * logits.grad
    dense = student.clone().requires_grad_()
    dense_divergence(dense, [teacher], "gkd").sum().backward()
    assert relative_error(expectation, dense.grad) <= 1e-10


def test_advantage_may_not_be_an_estimate_of_the_divergence() -> None:
    """What a widely copied form does: -(per-sample JSD) as an advantage. Its expected gradient points elsewhere."""
    student, teacher = _logits(seed=3)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    wrong, right = torch.zeros(T, V).double(), torch.zeros(T, V).double()
    for token in range(V):
        estimate = 0.5 * (log_p - log_m) + 0.5 * (log_q - log_p).exp() * (log_q - log_m)
        for total, policy in (
            (wrong, PolicyTerm(log_p[:, token], advantages=-estimate[:, token])),
            (right, PolicyTerm(log_p[:, token], advantage="jsd")),
        ):
            logits = student.clone().requires_grad_()
            targets = torch.full((T,), token)
            _terms(logits, teacher, lambda_distill=0.0, targets=targets, policy=policy).loss_sum.backward()
            total += log_p[:, token, None].exp() * logits.grad
    cosine = torch.nn.functional.cosine_similarity(wrong.flatten(), right.flatten(), dim=0)
    assert cosine < 0.9


CLIP, CAP = (0.2, 0.28), 1.1
OPTIONS = [
    {},
    {"clip": CLIP},
    {"importance_cap": CAP},
    {"old": True, "importance_cap": CAP, "clip": CLIP},
    {"old": True, "clip": CLIP, "advantage": "kl", "kl_coef": 0.5},
    {"advantage": "lambda_jsd", "lambda_coef": 0.2, "importance_cap": CAP},
    {"level": "sequence", "clip": CLIP},
    {"level": "sequence", "old": True, "importance_cap": CAP, "clip": CLIP, "advantage": "jsd", "beta": 0.3},
]


def policy_case(options: dict, tokens: int, vocabulary: int, seed: int = 4):
    """Logits, targets, weights and a term whose ratios lie on both sides of the clip and of the cap."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator) + 0.5
    weights[1::4] = 0
    options = dict(options)
    now = student.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    rollout, old = (now + 0.4 * torch.randn(tokens, generator=generator) for _ in range(2))
    term = PolicyTerm(
        rollout,
        coef=0.7,
        advantages=torch.randn(tokens, generator=generator),
        old_logprobs=old if options.pop("old", False) else None,
        sequence_ids=torch.arange(tokens) // 3,
        **options,
    )
    return student, teacher, targets, weights, term


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lambda_distill", [0.0, 1.3])
@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_mixed_objective_and_its_gradient_equal_the_dense_reference(
    options: dict, lambda_distill: float, chunk_tokens: int | None
) -> None:
    student, teacher, targets, weights, term = policy_case(options, 11, V)
    logits = student.clone().requires_grad_()
    terms = _terms(
        logits, teacher, type="gkd", beta=0.3, lambda_distill=lambda_distill, token_weights=weights, targets=targets,
        policy=term, chunk_tokens=chunk_tokens,
    )  # fmt: skip
    terms.loss_sum.backward()
    dense = student.double().requires_grad_()
    log_p, log_q = dense.log_softmax(-1), teacher.double().log_softmax(-1)
    per_token = lambda_distill * dense_divergence(dense, [teacher], "gkd", beta=0.3)
    of_policy = dense_policy_loss(log_p, log_q, targets, term, weights != 0)
    expected = ((per_token + term.coef * of_policy) * weights).sum()
    expected.backward()
    kept = weights != 0
    assert relative_error(terms.policy.loss[kept], of_policy[kept].detach()) <= 1e-5
    assert relative_error(terms.loss_sum.detach(), expected.detach()) <= 1e-5
    assert relative_error(logits.grad, dense.grad) <= 1e-5
    if options.get("clip") and options.get("level") is None:
        assert 0 < terms.policy.clipped[kept].sum() < kept.sum()


def test_gradient_of_a_nearly_certain_token_survives_bf16() -> None:
    """delta - p of a token with p = 0.998: rounding p first would leave half of its gradient."""
    student, teacher = torch.zeros(1, V, dtype=torch.bfloat16), torch.zeros(1, V, dtype=torch.bfloat16)
    student[0, 3] = 8.25
    log_p = student.double().log_softmax(-1)[:, 3]
    logits = student.clone().requires_grad_()
    policy = PolicyTerm(log_p.float(), advantages=torch.ones(1))
    _terms(logits, teacher, lambda_distill=0.0, targets=torch.tensor([3]), policy=policy).loss_sum.backward()
    assert logits.grad[0, 3].item() == pytest.approx(-(1 - log_p.exp().item()), rel=5e-3)


def test_masked_token_with_an_impossible_sample_does_not_matter() -> None:
    student, teacher, targets, _, term = policy_case({"level": "sequence", "clip": CLIP}, 6, V)
    weights = torch.tensor([1.0, 1, 0, 1, 1, 1])
    rollout = term.rollout_logprobs.clone()
    rollout[2] = -math.inf
    results = []
    for logprobs in (rollout, term.rollout_logprobs):
        logits = student.clone().requires_grad_()
        policy = replace(term, rollout_logprobs=logprobs)
        terms = _terms(logits, teacher, token_weights=weights, targets=targets, policy=policy)
        terms.loss_sum.backward()
        results.append((terms.loss_sum.detach(), logits.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[0][1][2].abs().max() == 0


def test_chunks_hold_whole_sequences() -> None:
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 4])
    term = PolicyTerm(torch.zeros(12), advantages=torch.zeros(12), level="sequence", sequence_ids=ids)
    bounds = [(x.start, x.stop) for x in chunk_bounds(12, torch.zeros(4, 2), 4, term)]
    assert bounds == [(0, 3), (3, 6), (6, 11), (11, 12)]
    assert [x.stop for x in chunk_bounds(12, torch.zeros(4, 2), 4, None)] == [4, 8, 12]
    assert chunk_bounds(0, torch.zeros(4, 2), 4, None) == []


def test_no_tokens_at_all() -> None:
    empty = torch.zeros(0)
    term = PolicyTerm(empty, advantage="kl")
    targets = torch.zeros(0, dtype=torch.int64)
    hidden = torch.zeros(0, V, requires_grad=True)
    terms = _terms(hidden, torch.zeros(0, V), targets=targets, policy=term)
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == 0
    assert terms.policy.ratio.shape == (0,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"advantage": "reward"}, "lambda_jsd"),
        ({"advantages": None}, "advantages is missing"),
        ({"advantages": torch.zeros(T + 1)}, "policy.advantages"),
        ({"rollout_logprobs": torch.zeros(T, 1)}, "rollout_logprobs"),
        ({"old_logprobs": torch.zeros(2)}, "old_logprobs"),
        ({"level": "word"}, "sequence"),
        ({"level": "sequence", "sequence_ids": None}, "sequence_ids"),
        ({"level": "sequence", "sequence_ids": torch.tensor([0, 1, 0, 1, 1])}, "non-decreasing"),
        ({"coef": math.nan}, "finite"),
        ({"beta": 1.5}, "[0, 1]"),
        ({"clip": (-0.1, 0.2)}, "clip"),
        ({"importance_cap": 0.0}, "importance_cap"),
    ],
)
def test_bad_terms_are_refused_in_one_line(change: dict, words: str) -> None:
    student, teacher = _logits(dtype=torch.float32)
    term = replace(PolicyTerm(torch.zeros(T), advantages=torch.zeros(T), sequence_ids=torch.zeros(T).long()), **change)
    with pytest.raises(ValueError) as error:
        _terms(student, teacher, targets=torch.zeros(T).long(), policy=term)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert ":" in str(error.value)


def test_a_policy_term_needs_the_sampled_tokens() -> None:
    student, teacher = _logits(dtype=torch.float32)
    with pytest.raises(ValueError, match="targets is missing"):
        _terms(student, teacher, policy=PolicyTerm(torch.zeros(T), advantage="kl"))
