"""The scores of a step's answers. The first rank has them judged while teachers score; all ranks get the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist

from opd_megatron.config import RewardsConfig
from opd_megatron.errors import DataError, RewardError, one_line
from opd_megatron.rewards.advantages import advantages
from opd_megatron.system.collectives import on_rank_0
from opd_megatron.tasks import task_named
from opd_megatron.tasks.pool import Question, Verdict, VerifierPool
from opd_megatron.types import Rollout

_MOST_WORKERS = 8


@dataclass(frozen=True, slots=True)
class StepRewards:
    """Of one step, in the order of its rollouts; the same on every rank."""

    rewards: list[float]
    """After penalties. 0 for an answer that nobody judges."""
    scores: list[float]
    """Before."""
    advantages: list[float]
    metrics: dict[str, float]


@dataclass(slots=True)
class Rewards:
    """Judges what the student has sampled. Every rank makes the same calls."""

    config: RewardsConfig
    tokenizer: Any
    longest: int
    """rollout.max_new_tokens"""
    pool: VerifierPool | None
    """On the first rank."""
    trained: int | None = None
    """objective.prefix_tokens"""
    _asked: tuple[Sequence[Rollout], dict[int, Future[Verdict]]] = field(default_factory=lambda: ((), {}))

    @staticmethod
    def of(config: RewardsConfig, tokenizer: Any, longest: int, trained: int | None = None) -> Rewards | None:
        """None where nobody judges."""
        if not config.judges:
            return None
        workers = config.workers or min(_MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) // 2))
        pool = VerifierPool(workers, config.time_limit) if dist.get_rank() == 0 else None
        return Rewards(config, tokenizer, longest, pool, trained)

    def begin(self, rollouts: Sequence[Rollout]) -> None:
        """Has the answers judged; waits for nothing. What was cut, or not sampled, is not asked about."""
        places = [i for i, each in enumerate(rollouts) if each.finish_reason == "stop" and self._task(each) is not None]
        futures: list[Future[Verdict]] = []
        if self.pool is not None:
            futures = self.pool.submit([self._question(rollouts[i]) for i in places])
        self._asked = rollouts, dict(zip(places, futures, strict=False))

    def finish(self) -> StepRewards:
        """Waits for the scores. Collective."""
        (rollouts, futures), self._asked = self._asked, ((), {})
        verdicts: dict[int, Verdict] = on_rank_0(
            lambda: {place: future.result() for place, future in futures.items()}, "answers", RewardError
        )
        judged = [i for i, each in enumerate(rollouts) if each.policy_version >= 0 and self._task(each) is not None]
        nothing = Verdict(0.0)
        scores = {i: verdicts.get(i, nothing).score for i in judged}
        rewards = [scores.get(i, 0.0) - self._penalty(each, verdicts.get(i)) for i, each in enumerate(rollouts)]
        lengths = [len(each.response_ids[: self.trained]) for each in rollouts]
        groups = [each.group for each in rollouts]
        found = advantages(
            rewards, groups, lengths, self.config.advantage, drop_equal=self.config.equal_groups == "drop"
        )
        before = [scores.get(i, 0.0) for i in range(len(rollouts))]
        return StepRewards(rewards, before, found, _metrics(scores, rewards, groups, list(verdicts.values())))

    def close(self) -> None:
        """Ends the processes that judge. Safe to call twice."""
        if self.pool is not None:
            self.pool.close()

    def _task(self, rollout: Rollout) -> str | None:
        return self.config.task_of(rollout.prompt.task)

    def _question(self, rollout: Rollout) -> Question:
        prompt, task = rollout.prompt, self._task(rollout)
        assert task is not None
        try:
            answer = self.tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True)
        except Exception:  # tokens that make no text are an answer that is wrong
            answer = ""
        row = {"answer": prompt.answer, "prompt": prompt.text, "task": prompt.task, **prompt.fields}
        return Question(task, answer, row)

    def _penalty(self, rollout: Rollout, verdict: Verdict | None) -> float:
        if rollout.policy_version < 0 or self._task(rollout) is None:
            return 0.0
        of_length = self.config.length_penalty * len(rollout.response_ids) / self.longest
        return of_length + (self.config.format_penalty if verdict is None or not verdict.found else 0.0)


def _metrics(
    scores: dict[int, float], rewards: Sequence[float], groups: Sequence[int], verdicts: Sequence[Verdict]
) -> dict[str, float]:
    """`reward`, the mean score before penalties; `reward/with_penalties`; of the groups, the share in which all rewards
    are `reward/equal`; and answers whose verifier was too slow (`reward/timeouts`) or failed (`reward/errors`)."""
    if not scores:
        return {}
    by_group: dict[int, set[float]] = {}
    for i in scores:
        by_group.setdefault(groups[i], set()).add(rewards[i])
    problems = [verdict.problem for verdict in verdicts if verdict.problem is not None]
    slow = problems.count("timeout")
    return {
        "reward": sum(scores.values()) / len(scores),
        "reward/with_penalties": sum(rewards[i] for i in scores) / len(scores),
        "reward/equal": sum(len(found) == 1 for found in by_group.values()) / len(by_group),
        "reward/timeouts": float(slow),
        "reward/errors": float(len(problems) - slow),
    }


class JudgedRow(Protocol):
    """What of a row decides whether it can be judged."""

    @property
    def id(self) -> str: ...
    @property
    def task(self) -> str | None: ...
    @property
    def answer(self) -> str | None: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...


def check_rewards(config: RewardsConfig, rows: Iterable[JudgedRow]) -> None:
    """Makes sure that there are such tasks, and that rows have what these want.

    Raises:
        ConfigError: there is no such task.
        DataError: names the first row without a gold answer, or that cannot be judged.
    """
    for name in {config.task, *config.tasks.values()} - {None}:
        task_named(str(name))
    if not config.judges:
        return
    found = {name: task_named(name) for name in {config.task, *config.tasks.values()} if name is not None}
    for row in rows:
        name = config.task_of(row.task)
        if name is None:
            continue
        if row.answer is None and found[name].needs_answer:
            raise DataError(
                f"task {name!r} compares with a gold answer, but prompt {row.id!r} has none: set "
                "data.answer_column, or give the row a task of its own (rewards.tasks)"
            )
        try:
            for check in filter(None, [found[name].check]):
                check(row.fields)
        except (ValueError, KeyError) as error:
            raise DataError(
                f"task {name!r} cannot judge answers to prompt {row.id!r}, which {one_line(error)}: use data of that "
                "task"
            ) from None
