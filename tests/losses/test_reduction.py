"""What a step reports: right sums from one pass, and means that weight every token alike however tokens are split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_megatron.losses import DivergenceTerms, linear_divergence_terms
from opd_megatron.losses.policy import PolicyTerm
from opd_megatron.losses.reduction import DIVERGENCE_METRICS, POLICY_METRICS, TokenSums, global_means, token_sums
from tests.ranks import run_ranks

CPU = torch.device("cpu")
V, H = 11, 6


def _models(tokens: int, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states and heads of a student and a teacher, float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(tokens, H, generator=generator, dtype=torch.float64) for _ in range(2)]
    heads = [torch.randn(V, H, generator=generator, dtype=torch.float64) for _ in range(2)]
    return hidden, heads


def _log_probs(hidden: list[torch.Tensor], heads: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    log_p, log_q = ((states @ head.t()).log_softmax(-1) for states, head in zip(hidden, heads, strict=True))
    return log_p, log_q


def _terms(hidden: list[torch.Tensor], heads: list[torch.Tensor], **options: Any) -> DivergenceTerms:
    return linear_divergence_terms(hidden[0], heads[0], [(hidden[1], heads[1])], **options)


def _means(sums: TokenSums) -> dict[str, float]:
    values, _ = global_means([sums], [], CPU, sums.names)
    return dict(zip(sums.names, values, strict=True))


def test_every_metric_equals_its_formula_on_the_tokens_that_count() -> None:
    hidden, heads = _models(9)
    targets = torch.arange(9)
    weights = torch.tensor([1.0, 0.0, 2.0] * 3, dtype=torch.float64)
    means = _means(token_sums(_terms(hidden, heads, targets=targets, token_weights=weights), weights))
    kept = weights > 0
    log_p, log_q = (x[kept] for x in _log_probs(hidden, heads))
    p, q, chosen = log_p.exp(), log_q.exp(), targets[kept][:, None]
    at_p, at_q = log_p.gather(1, chosen)[:, 0], log_q.gather(1, chosen)[:, 0]
    r, kl = at_p - at_q, (p * (log_p - log_q)).sum(-1)
    expected = {
        "loss": (weights[kept] * kl).sum() / kept.sum(),
        "reverse_kl": kl.mean(),
        "forward_kl": (q * (log_q - log_p)).sum(-1).mean(),
        "student_entropy": -(p * log_p).sum(-1).mean(),
        "teacher_entropy": -(q * log_q).sum(-1).mean(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean(),
        "nll": -at_p.mean(),
        "teacher_nll": -at_q.mean(),
        "k1": r.mean(),
        "k2": (r**2 / 2).mean(),
        "k3": (torch.exp(-r) - 1 + r).mean(),
        "k1_gap": (r - kl).mean(),
    }
    assert tuple(means) == DIVERGENCE_METRICS == tuple(expected)
    for name, value in expected.items():
        assert means[name] == pytest.approx(value.item(), rel=1e-9), name


def test_k1_and_k3_average_to_the_exact_divergence_over_the_students_samples() -> None:
    hidden, heads = _models(1, seed=3)
    of_token = [_means(token_sums(_terms(hidden, heads, targets=torch.tensor([a])))) for a in range(V)]
    p = _log_probs(hidden, heads)[0].exp()[0].tolist()
    expected = {name: sum(p[a] * of_token[a][name] for a in range(V)) for name in ("k1", "k2", "k3", "k1_gap")}
    kl = of_token[0]["reverse_kl"]
    assert kl > 0.1
    assert expected["k1"] == pytest.approx(kl, rel=1e-9)
    assert expected["k3"] == pytest.approx(kl, rel=1e-9)
    assert expected["k1_gap"] == pytest.approx(0, abs=1e-9)
    assert expected["k2"] != pytest.approx(kl, rel=1e-2), "k2 is the biased one"
    assert min(means["k3"] for means in of_token) >= 0


def test_a_policy_term_adds_its_own_metrics() -> None:
    hidden, heads = _models(8, seed=1)
    targets = torch.arange(8)
    log_p, log_q = (x.gather(1, targets[:, None])[:, 0] for x in _log_probs(hidden, heads))
    rollout = log_p + torch.linspace(-0.6, 0.6, 8)
    policy = PolicyTerm(rollout_logprobs=rollout, coef=3.0, advantage="kl", clip=(0.2, 0.2))
    terms = _terms(hidden, heads, type="gkd", targets=targets, lambda_distill=0.0, policy=policy)
    sums = token_sums(terms)
    means = _means(sums)
    assert sums.names == DIVERGENCE_METRICS + POLICY_METRICS
    ratio, advantage = (log_p - rollout).exp(), log_q - rollout
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    clipped = surrogate < ratio * advantage
    assert 0 < clipped.sum() < 8, "the case must hold both"
    expected = {
        "divergence": terms.divergence.mean(),
        "policy_loss": -surrogate.mean(),
        "advantage": advantage.mean(),
        "ratio": ratio.mean(),
        "clip_fraction": clipped.double().mean(),
        "loss": -3 * surrogate.mean(),
    }
    for name, value in expected.items():
        assert means[name] == pytest.approx(value.item(), rel=1e-9), name


def test_a_masked_infinity_stays_out_of_every_mean() -> None:
    hidden, heads = _models(4, seed=2)
    hidden[1][0] = math.nan
    weights = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    policy = PolicyTerm(rollout_logprobs=torch.tensor([math.nan, -1.0, -1.0, -1.0]).double(), advantage="kl")
    terms = _terms(hidden, heads, targets=torch.arange(4), token_weights=weights, policy=policy)
    sums = token_sums(terms, weights)
    assert sums.num_tokens.item() == 3
    assert all(math.isfinite(value) for value in _means(sums).values())


def test_a_rank_without_micro_batches_reports_as_many_names() -> None:
    names = DIVERGENCE_METRICS + POLICY_METRICS
    assert global_means([], [], CPU) == ([0.0] * len(DIVERGENCE_METRICS), 0)
    assert global_means([], [], CPU, names) == ([0.0] * len(names), 0)
    without = token_sums(_terms(*_models(2), targets=torch.arange(2)))
    with pytest.raises(AssertionError, match="policy_loss"):
        global_means([without], [], CPU, names)


# -- data- and context-parallel ranks ----------------------------------------------------------------------------------

SEQUENCES, LENGTH, DATA, CONTEXT = 4, 8, 2, 2
OBJECTIVES: dict[str, dict[str, Any]] = {
    "divergence": {"type": "gkd", "beta": 0.3},
    "mixed": {"type": "reverse_kl", "lambda_distill": 0.5},
}


def _context_positions(part: int) -> list[int]:
    """Megatron's share of one of `CONTEXT` ranks: a chunk from the front and its mirror image from the back."""
    size = LENGTH // (2 * CONTEXT)
    chunks = (part, 2 * CONTEXT - 1 - part)
    return [position for chunk in chunks for position in range(chunk * size, (chunk + 1) * size)]


def _responses() -> torch.Tensor:
    """[SEQUENCES, LENGTH] bool: lengths that leave the four ranks with 0, 4, 5 and 7 tokens of 16."""
    mask = torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool)
    for row, (first, last) in enumerate([(2, 3), (4, 5), (1, 7), (3, 7)]):
        mask[row, first : last + 1] = True
    return mask


def _step(rows: slice, positions: list[int], kind: str) -> tuple[TokenSums, list[torch.Tensor]]:
    """Sums of these tokens, and the gradients of an adapter in front of the head and of the head itself."""
    generator = torch.Generator().manual_seed(4)
    features, teacher = (
        torch.randn(SEQUENCES, LENGTH, H, generator=generator, dtype=torch.float64)[rows][:, positions] for _ in "st"
    )
    adapter = torch.randn(H, H, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_()
    teacher_head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (SEQUENCES, LENGTH), generator=generator)[rows][:, positions]
    rollout = -3 * torch.rand(SEQUENCES, LENGTH, generator=generator, dtype=torch.float64)[rows][:, positions]
    mask = _responses()[rows][:, positions]
    policy = (
        PolicyTerm(rollout_logprobs=rollout[mask], advantage="jsd", importance_cap=2.0) if kind == "mixed" else None
    )
    terms = linear_divergence_terms(
        features[mask] @ adapter, head, [(teacher[mask], teacher_head)], targets=targets[mask], policy=policy,
        **OBJECTIVES[kind],
    )  # fmt: skip
    terms.loss_sum.backward()
    assert adapter.grad is not None
    assert head.grad is not None
    return token_sums(terms), [adapter.grad, head.grad]


def _grid_body(rank: int, ranks: int, kind: str) -> Any:
    data, context = divmod(rank, CONTEXT)
    # Every rank makes every group, in one order.
    of_context = [dist.new_group([d * CONTEXT + c for c in range(CONTEXT)]) for d in range(DATA)]
    of_data = [dist.new_group([d * CONTEXT + c for d in range(DATA)]) for c in range(CONTEXT)]
    size = SEQUENCES // DATA
    sums, gradients = _step(slice(data * size, (data + 1) * size), _context_positions(context), kind)
    groups = [of_context[data], of_data[context]]
    means, tokens = global_means([sums], groups, CPU, sums.names)
    whole, tokens_again = global_means([sums], [dist.group.WORLD], CPU, sums.names)
    assert means == pytest.approx(whole, rel=1e-12)
    assert tokens == tokens_again
    for gradient in gradients:
        dist.all_reduce(gradient)
    return sums.num_tokens.item(), means, tokens, [gradient / tokens for gradient in gradients]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_data_and_context_parallel_ranks_give_what_one_rank_gives(kind: str) -> None:
    sums, gradients = _step(slice(None), list(range(LENGTH)), kind)
    expected, tokens = global_means([sums], [], CPU, sums.names)
    results = run_ranks(DATA * CONTEXT, _grid_body, kind)
    assert sorted(own for own, *_ in results) == [0, 4, 5, 7], "ranks must hold unequal counts, one of them none"
    for _, means, total, shared in results:
        assert total == tokens == 16
        assert means == pytest.approx(expected, rel=1e-10)
        for actual, whole in zip(shared, gradients, strict=True):
            torch.testing.assert_close(actual, whole / tokens, rtol=1e-10, atol=1e-14)
