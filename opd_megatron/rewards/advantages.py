"""From rewards of a prompt's answers to the advantage of each: how much better it is than the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

STD_EPSILON = 1e-4
"""Added to a group's standard deviation, as TRL does."""


def group_mean(rewards: torch.Tensor) -> torch.Tensor:
    """r - mean of the group (Dr. GRPO, arXiv 2503.20783). [groups, G]."""
    return rewards - rewards.mean(1, keepdim=True)


def grpo(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / (standard deviation + 1e-4), the unbiased one (GRPO, arXiv 2402.03300)."""
    spread = rewards.std(1, keepdim=True) if rewards.shape[1] > 1 else torch.zeros_like(rewards)
    return group_mean(rewards) / (spread + STD_EPSILON)


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """r - mean of the group's others (RLOO, arXiv 2402.14740)."""
    count = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * count / max(count - 1, 1)


ADVANTAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "grpo": grpo, "group_mean": group_mean, "leave_one_out": leave_one_out,
}  # fmt: skip
"""`rewards.advantage` -> rewards [groups, G] to advantages."""


def advantages(
    rewards: Sequence[float], groups: Sequence[int], lengths: Sequence[int], kind: str, *, drop_equal: bool
) -> list[float]:
    """Computes the advantage of each answer.

    Args:
        rewards, groups, lengths: of each answer: its score, its prompt's number, its tokens. Groups are of one size.
        kind: of `ADVANTAGES`.
        drop_equal: leave groups whose answers all have one reward out of the policy gradient's mean over tokens. They
            have no gradient either way; the others' advantages grow by all tokens over their tokens.
    """
    order = sorted(range(len(rewards)), key=lambda i: groups[i])
    size = len(rewards) // len(set(groups))
    table = torch.tensor([rewards[i] for i in order], dtype=torch.float64).view(-1, size)
    found = ADVANTAGES[kind](table)
    equal = (table == table[:, :1]).all(1)
    found[equal] = 0.0
    if drop_equal and not bool(equal.all()):
        tokens = torch.tensor([lengths[i] for i in order], dtype=torch.float64).view(-1, size)
        found *= tokens.sum() / tokens[~equal].sum()
    result = [0.0] * len(rewards)
    for i, value in zip(order, found.flatten().tolist(), strict=True):
        result[i] = value
    return result
