"""Between sampling and batching: where rollouts are scored and filtered, before a rank takes its share of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from opd_megatron.types import Rollout


class RolloutStage(Protocol):
    """One stage. It sees all rollouts of a step, on every rank and in the same order, and must give every rank the same
    answer: data-parallel ranks divide the result among themselves without talking."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        """Returns the rollouts that are trained on, those of a `group` together: with an `advantage` each, or fewer."""


def apply_stages(rollouts: Sequence[Rollout], stages: Sequence[RolloutStage]) -> list[Rollout]:
    """Passes the rollouts of a step through the stages, in their order."""
    for stage in stages:
        rollouts = stage(rollouts)
    return list(rollouts)


def prefixes(rollouts: Sequence[Rollout], tokens: int | None) -> list[Rollout]:
    """Cuts every answer to its first `tokens`, and what is known of each token with it; None leaves all whole."""
    if tokens is None:
        return list(rollouts)
    return [
        replace(
            rollout,
            response_ids=rollout.response_ids[:tokens],
            logprobs=None if rollout.logprobs is None else rollout.logprobs[:tokens],
        )
        for rollout in rollouts
    ]
