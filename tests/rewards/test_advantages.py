"""Advantages within a group, against numbers worked out by numpy and against TRL's formula."""

from __future__ import annotations

import numpy as np
import pytest

from opd_megatron.rewards.advantages import ADVANTAGES, advantages

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 0.25, 0.0, 0.0]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
LENGTHS = [3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4]


def _expected(kind: str) -> list[float]:
    table = np.array(REWARDS).reshape(3, 4)
    mean = table.mean(1, keepdims=True)
    found = {
        "grpo": (table - mean) / (table.std(1, ddof=1, keepdims=True) + 1e-4),
        "group_mean": table - mean,
        "leave_one_out": table - (table.sum(1, keepdims=True) - table) / 3,
    }[kind]
    return [float(value) for value in found.ravel()]


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_an_advantage_is_over_the_group(kind: str) -> None:
    assert advantages(REWARDS, GROUPS, LENGTHS, kind, drop_equal=False) == pytest.approx(_expected(kind))


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_answers_need_not_stand_group_by_group(kind: str) -> None:
    order = [7, 0, 11, 4, 1, 8, 2, 5, 9, 3, 6, 10]
    shuffled = [[values[i] for i in order] for values in (REWARDS, GROUPS, LENGTHS)]
    found = advantages(shuffled[0], shuffled[1], shuffled[2], kind, drop_equal=False)
    assert found == pytest.approx([_expected(kind)[i] for i in order])


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_a_group_of_equal_rewards_has_no_advantage_and_may_be_dropped_from_the_mean(kind: str) -> None:
    kept = advantages(REWARDS, GROUPS, LENGTHS, kind, drop_equal=False)
    dropped = advantages(REWARDS, GROUPS, LENGTHS, kind, drop_equal=True)
    assert kept[4:8] == dropped[4:8] == [0.0] * 4
    scale = sum(LENGTHS) / (sum(LENGTHS) - sum(LENGTHS[4:8]))
    assert dropped == pytest.approx([value * scale for value in kept])
    assert advantages([0.3] * 4, [0] * 4, [1] * 4, kind, drop_equal=True) == [0.0] * 4


def test_a_group_of_one_has_none() -> None:
    for kind in ADVANTAGES:
        assert advantages([1.0, 0.0], [0, 1], [3, 3], kind, drop_equal=False) == [0.0, 0.0]
