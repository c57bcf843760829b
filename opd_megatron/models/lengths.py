"""How long answers are, as a plan assumes it: a mean and a longest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

_POINTS = 1000


@dataclass(frozen=True)
class AnswerLengths:
    """Lengths in tokens. Every token ends its answer with the same probability until the longest is reached, which cuts
    the rest: few are long, and of many answers one runs to the end."""

    mean: float
    longest: int

    def __post_init__(self) -> None:
        assert 0 < self.mean <= self.longest, (self.mean, self.longest)

    @cached_property
    def mean_square(self) -> float:
        """Of the lengths: what an answer's tokens read of the keys and values before them grows with it."""
        return self._integral(lambda length, over: 2 * length * over)

    def longest_of(self, count: int) -> float:
        """The expected length of the longest of `count` answers."""
        return self._integral(lambda _, over: -math.expm1(count * math.log1p(-min(over, 1 - 1e-15))))

    def _integral(self, value: Callable[[float, float], float]) -> float:
        """Of `value(length, share of answers that are longer)`, from 0 to the longest."""
        total = 0.0
        for point in range(_POINTS):
            part = (point + 0.5) / _POINTS  # closer together where answers are short
            length, width = self.longest * part**3, 3 * self.longest * part**2 / _POINTS
            total += width * value(length, math.exp(-length / self._scale))
        return total

    @cached_property
    def _scale(self) -> float:
        """Mean length if none were cut: found by halving, as scale * (1 - exp(-longest / scale)) is the mean."""
        low, high = self.mean / 2, 1e6 * self.longest
        for _ in range(100):
            middle = math.sqrt(low * high)
            if -middle * math.expm1(-self.longest / middle) < self.mean:
                low = middle
            else:
                high = middle
        return high
