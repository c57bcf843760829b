"""Rewards: answers are judged by their task beside the next phase, and become advantages within their group.

scoring.py      Rewards, what a run asks
advantages.py   from the rewards of a group to the advantage of each answer
"""

from opd_megatron.rewards.scoring import Rewards, StepRewards, check_rewards

__all__ = ["Rewards", "StepRewards", "check_rewards"]
