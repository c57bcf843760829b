"""The table of objectives: what each entry computes, reports and reads is what the rest of the package shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opd_megatron.config import ObjectiveConfig
from opd_megatron.errors import ConfigError
from opd_megatron.losses import linear_divergence_terms
from opd_megatron.losses.divergences import DIVERGENCES
from opd_megatron.losses.objectives import (
    KEYS,
    OBJECTIVES,
    REWARDS,
    Term,
    loss_arguments,
    metric_names,
    objective_terms,
    users_of,
)
from opd_megatron.losses.reduction import token_sums
from opd_megatron.types import Batch

OBJECTIVES_PAGE = Path(__file__).parents[2] / "docs/objectives.md"
every_type = pytest.mark.parametrize("name", OBJECTIVES)


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (3, 6), generator=generator)
    weights = torch.zeros(3, 6)
    weights[0, 2:4] = weights[1, 1:5] = weights[2, 4:5] = 1
    logprobs = -3 + torch.rand(3, 6, generator=generator)
    advantages = torch.tensor([1.0, -2.0, 0.5])[:, None]
    return Batch(tokens, tokens.roll(-1, 1), weights, logprobs * weights, advantages * weights)


def _gradient(terms: list[Term]) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """(loss, gradient of the hidden states, names of the metrics) of a sum of terms."""
    batch = _batch()
    mask = batch.weights > 0
    generator = torch.Generator().manual_seed(1)
    hidden, head, teacher, teacher_head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 4), (11, 4), (7, 5), (11, 5))
    )
    hidden.requires_grad_()
    result = linear_divergence_terms(
        hidden, head, [(teacher, teacher_head)], targets=batch.targets[mask], **loss_arguments(terms, batch, mask)
    )
    result.loss_sum.backward()
    assert hidden.grad is not None
    names = metric_names([term for term in terms if not term.is_further])
    return result.loss_sum.detach(), hidden.grad, token_sums(result, names=names).names


@every_type
def test_a_type_reports_the_metrics_that_its_entry_names(name: str) -> None:
    terms = objective_terms(ObjectiveConfig(type=name))
    further = [term for term in terms if term.is_further]
    assert (*_gradient(terms)[2], *metric_names(further)) == metric_names(terms)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"sft"}))
def test_a_reward_term_beside_a_type_adds_its_gradient(name: str) -> None:
    alone = objective_terms(ObjectiveConfig(type=name, lambda_distill=0.5))
    both = objective_terms(ObjectiveConfig(type=name, lambda_distill=0.5, lambda_rl=0.75, truncation=2.0))
    assert len(both) == len(alone) + 1
    exact_zero = Term({"type": "reverse_kl", "lambda_distill": 0.0})
    parts = [_gradient(alone), _gradient([exact_zero, both[1]])]
    loss, gradient, _ = _gradient(both)
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0])
    torch.testing.assert_close(gradient, parts[0][1] + parts[1][1])
    assert parts[1][1].abs().max() > 1e-2


def test_a_term_of_ones_own_is_added_like_any_other() -> None:
    toy = Term(policy={"advantage": "given", "coef": 3.0, "level": "token"})
    exact = objective_terms(ObjectiveConfig(type="gkd", beta=0.3))
    alone = _gradient([Term({"type": "reverse_kl", "lambda_distill": 0.0}), toy])[1]
    torch.testing.assert_close(_gradient([*exact, toy])[1], _gradient(exact)[1] + alone)


def test_one_pass_computes_one_divergence() -> None:
    exact = Term({"type": "reverse_kl", "lambda_distill": 1.0})
    for terms in ([exact, exact], []):
        with pytest.raises(ConfigError, match="one divergence"):
            loss_arguments(terms, _batch(), _batch().weights > 0)


def test_every_divergence_is_an_objective_with_its_parameter_as_key() -> None:
    for name, family in DIVERGENCES.items():
        assert OBJECTIVES[name].keys == (() if family.argument is None else (family.argument,))
    assert all(users_of(key) for key in KEYS)
    assert set(REWARDS.keys) <= KEYS.keys()


def test_an_entry_of_the_table_is_all_that_a_new_key_needs() -> None:
    values = SimpleNamespace(type="gkd", beta=0.25, lambda_distill=2.0, lambda_rl=0.0)
    (term,) = objective_terms(values)
    assert term == Term({"type": "gkd", "lambda_distill": 2.0, "beta": 0.25})


@every_type
def test_the_page_of_objectives_shows_the_entry(name: str) -> None:
    entry = OBJECTIVES[name]
    keys = ", ".join(f"`{key}`" for key in entry.keys)
    assert f"| `{name}` | {entry.formula} | {keys} | {entry.paper} |" in OBJECTIVES_PAGE.read_text().splitlines()


def test_the_table_is_read_without_torch() -> None:
    code = "import opd_megatron.losses.objectives, opd_megatron.config, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
