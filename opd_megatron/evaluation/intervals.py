"""Estimates from scores, with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054
"""Of a normal distribution, for 95%."""
_RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A share with its interval."""

    value: float
    low: float
    high: float


def wilson(scores: Sequence[float]) -> Estimate:
    """The mean of one score for each prompt, with Wilson's score interval (Wilson 1927).

    Scores are in [0, 1]; of such that are neither 0 nor 1 the interval is too wide, as their variance is smaller.
    """
    assert scores, "an estimate of no scores"
    n = len(scores)
    p = math.fsum(scores) / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of one value for each prompt, with the percentile interval of resampled prompts (Efron 1979)."""
    assert values, "an estimate of no values"
    found = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, len(found), size=(_RESAMPLES, len(found)))
    low, high = np.quantile(found[chosen].mean(axis=1), (0.025, 0.975))
    return Estimate(float(found.mean()), float(low), float(high))


def pass_at(k: int, samples: int, right: int) -> float:
    """Estimates without bias that one of k samples is right, of `samples` of which `right` are (arXiv 2107.03374)."""
    assert 1 <= k <= samples, f"pass@{k} of {samples} samples"
    if samples - right < k:
        return 1.0
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def ks_of(samples: int) -> list[int]:
    """The k of pass@k that are reported: powers of two, and all samples."""
    powers = [2**exponent for exponent in range(samples.bit_length()) if 2**exponent <= samples]
    return powers if not powers or powers[-1] == samples else [*powers, samples]
