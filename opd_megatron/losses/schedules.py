"""Weights of an objective that change over the steps of a run: straight lines between points. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

WEIGHTS = ("lambda_distill", "lambda_rl", "sft_coef", "reference_kl")
"""Keys of `objective:` that may have a schedule."""


def largest(values: Any, name: str) -> float:
    """The largest value that a weight of a section `objective:` has in a run; 0 for one that the section lacks."""
    points = _points(values, name)
    return max(points.values()) if points else float(getattr(values, name, 0.0))


def at_step(values: Any, name: str, step: int) -> float:
    """The value at a step, counted from 0: of the first point before it, of the last point after it."""
    points = _points(values, name)
    if not points:
        return float(getattr(values, name))
    steps = sorted(points)
    place = bisect_right(steps, step)
    if place == 0:
        return points[steps[0]]
    if place == len(steps):
        return points[steps[-1]]
    left, right = steps[place - 1], steps[place]
    share = (step - left) / (right - left)
    return points[left] + share * (points[right] - points[left])


def _points(values: Any, name: str) -> Mapping[int, float]:
    schedules = getattr(values, "schedules", None) or {}
    found: Mapping[int, float] = schedules.get(name, {})
    return found
