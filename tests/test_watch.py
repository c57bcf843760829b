"""What a run's numbers say in words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from opd_megatron.losses import linear_divergence_terms
from opd_megatron.losses.reduction import MISMATCH, token_sums
from opd_megatron.metrics import Watch, how_it_went


def rows(values: list[float], **columns: Any) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": value, "reverse_kl": value, **{key: of[step - 1] for key, of in columns.items()}}
        for step, value in enumerate(values, start=1)
    ]


def texts(*arguments: Any, **options: Any) -> list[str]:
    return [str(finding) for finding in how_it_went(*arguments, **options)]


FALLING = [2.0 * 0.9**step for step in range(30)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (FALLING, "reverse KL fell from 2.000 to 0.118"),
        ([1.0 + 0.1 * step for step in range(20)], "diverging: reverse KL rose from"),
        ([*FALLING, *(0.2 + 0.05 * step for step in range(10))], "and rose to"),
        ([1.0] * 20, "reverse KL hardly fell"),
        ([2.0, 1.0], "reverse KL fell from 2.000 to 1.000"),
    ],
)
def test_the_course_of_the_divergence_is_told(values: list[float], said: str) -> None:
    (line,) = texts(rows(values))
    assert said in line
    assert ("docs/troubleshooting.md" in line) == ("fell from" not in line)


def test_what_went_wrong_is_told_with_its_symptom() -> None:
    many = len(FALLING)
    found = texts(
        rows(FALLING, grad_norm=[5.0] * many, mismatch=[1.3] * many, **{"rollout/truncated": [0.9] * many}),
        clip_grad=1.0,
    )
    assert "gradients were clipped in 100% of the steps" in found[1]
    assert "90% of the last answers were cut" in found[2]
    assert "mismatch 1.300" in found[3]
    assert len(texts(rows(FALLING, grad_norm=[5.0] * many), clip_grad=0.0)) == 1, "clipping may be off"
    assert texts([{"step": 0, "eval/nll": 1.0}]) == []
    assert texts(rows([1.0])) == []


def test_answers_that_double_are_warned_of_once_in_twenty_steps() -> None:
    watch, said = Watch(), []
    for step in range(1, 61):
        length = 40 if step <= 20 else 100 if step <= 40 else 300
        for finding in watch.look({"step": step, "rollout/mean_length": length, "mismatch": 1.0}):
            said.append((step, str(finding)))
    assert [step for step, _ in said] == [24, 44]
    assert "answers have grown from 40 to" in said[0][1]
    assert "Answers grow without end" in said[0][1]


def test_a_mismatch_is_warned_of_at_once() -> None:
    watch = Watch()
    assert watch.look({"step": 1, "mismatch": 1.05}) == []
    assert "mismatch 1.200" in str(watch.look({"step": 2, "mismatch": 1.2})[0])
    assert watch.look({"step": 3, "mismatch": 1.2}) == []
    assert len(watch.look({"step": 22, "mismatch": 1.2})) == 1


def test_mismatch_is_the_mean_of_the_exponential_of_the_difference() -> None:
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(6, 8), torch.randn(20, 8), torch.arange(6)
    terms = linear_divergence_terms(hidden, head, [(hidden + 0.1, head)], vocab_size=20, targets=targets)
    own = (hidden @ head.t()).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    weights = torch.tensor([1.0, 1, 0, 1, 1, 1])
    off = torch.tensor([0.0, 0.1, 9.0, -0.2, 0.3, -50.0])
    sums = token_sums(terms, weights, own + off)
    expected = sum(math.exp(min(20.0, abs(value))) for value in (0.0, 0.1, -0.2, 0.3, -50.0))
    assert sums.names[-1] == MISMATCH
    assert float(sums.sums[-1]) == pytest.approx(expected, rel=1e-5)
    assert MISMATCH not in token_sums(terms, weights).names
