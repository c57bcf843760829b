"""Estimates: against exact figures, and intervals against how often they hold the truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from opd_megatron.errors import ConfigError
from opd_megatron.evaluation import from_json, to_json
from opd_megatron.evaluation.intervals import bootstrap, ks_of, pass_at, wilson
from opd_megatron.evaluation.result import Accuracy, PromptScores


def test_wilson_equals_published_figures() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, of, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson([1.0] * right + [0.0] * (of - right))
        assert found.value == pytest.approx(right / of)
        assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("truth", [0.05, 0.5, 0.9])
def test_intervals_hold_the_truth_about_19_times_in_20(truth: float) -> None:
    generator = np.random.default_rng(0)
    for estimate, least in ((wilson, 0.92), (bootstrap, 0.88)):  # a bootstrap of few prompts is a little too narrow
        held = 0
        for _ in range(200):
            found = estimate(list((generator.random(80) < truth).astype(float)))
            held += found.low <= truth <= found.high
        assert held / 200 >= least, (estimate.__name__, held)


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples() -> None:
    for right, of in ((0, 4), (1, 4), (3, 6), (6, 6)):
        scores = [1] * right + [0] * (of - right)
        for k in range(1, of + 1):
            choices = [max(chosen) for chosen in itertools.combinations(scores, k)]
            assert pass_at(k, of, right) == pytest.approx(math.fsum(choices) / len(choices))


def test_the_k_that_are_reported_are_powers_of_two_and_all() -> None:
    assert [ks_of(samples) for samples in (0, 1, 4, 6)] == [[], [1], [1, 2, 4], [1, 2, 4, 6]]


def _result() -> Accuracy:
    scores = [
        PromptScores("a", 1.0, [1.0, 0.0]),
        PromptScores("b", 0.0, [0.0, 0.0]),
        PromptScores("ü", 1.0, [1.0, 1.0]),
    ]
    return Accuracy("gsm8k", "m", 3, scores, 1.0, 64, 0.0, 10.5, 1, 0, 2.5)


def test_a_result_survives_json() -> None:
    assert from_json(to_json([_result()])) == [_result()]
    for text in ('{"a": 1}', "[1]", "nonsense", '[{"task": "a"}]'):
        with pytest.raises(ConfigError, match="no evaluation in JSON"):
            from_json(text)


def test_estimates_of_a_result() -> None:
    found = _result().estimates()
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(
        {"accuracy": 2 / 3, "avg@2": 0.5, "pass@1": 0.5, "pass@2": 2 / 3}
    )
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in found.values())
