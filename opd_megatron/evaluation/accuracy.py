"""Answers to held-out prompts, by the rollout engine with the student's current weights, and what they score."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opd_megatron.config import RunConfig
from opd_megatron.evaluation.result import Accuracy, PromptScores
from opd_megatron.rewards import Rewards, StepRewards
from opd_megatron.rollout import RolloutClient
from opd_megatron.types import Prompt, Rollout, SampleRequest, Sampling

_AT_ONCE = 1024
"""Answers that an engine is asked for at a time: enough to keep it full, few enough to see them go by."""
_SEEDS = 7_368_787
"""Apart from those of training."""


@dataclass(slots=True)
class AccuracyEvaluator:
    """Every rank makes the same calls."""

    config: RunConfig
    prompts: Sequence[Prompt]
    client: RolloutClient
    judge: Rewards
    stop_token_ids: tuple[int, ...]

    @staticmethod
    def of(
        config: RunConfig, held_out: Sequence[Prompt], tokenizer: Any, client: RolloutClient, stops: tuple[int, ...]
    ) -> AccuracyEvaluator | None:
        """None where no task is evaluated."""
        judges = config.rewards.of_evaluation(config.evaluation.task)
        judge = Rewards.of(judges, tokenizer, config.rollout.max_new_tokens)
        if judge is None:
            return None
        return AccuracyEvaluator(config, held_out[: config.evaluation.asked], client, judge, stops)

    def measure(
        self, model: str, step: int | None, on_progress: Callable[[int, int], None] = lambda done, of: None
    ) -> Accuracy:
        """Answers every prompt greedily, and `evaluation.samples` times at rollout.temperature. The engines have the
        weights already. Collective.

        Args:
            on_progress: is given how many answers there are, of how many.
        """
        began, samples = time.monotonic(), self.config.evaluation.samples
        rollout, total = self.config.rollout, len(self.prompts) * (1 + samples)
        greedy = self._answered(self.prompts, 0.0, 1.0, on_progress, 0, total)
        repeated = [prompt for prompt in self.prompts for _ in range(samples)]
        drawn = self._answered(repeated, rollout.temperature, rollout.top_p, on_progress, len(greedy), total)
        self.judge.begin(greedy + drawn)
        found = self.judge.finish()
        scores = found.scores[len(greedy) :]
        return Accuracy(
            task=str(self.config.evaluation.task),
            model=model,
            step=step,
            scores=[
                PromptScores(prompt.id, found.scores[i], scores[i * samples : (i + 1) * samples])
                for i, prompt in enumerate(self.prompts)
            ],
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            truncated=sum(each.finish_reason != "stop" for each in greedy) / len(greedy),
            mean_length=sum(len(each.response_ids) for each in greedy) / len(greedy),
            timeouts=_count(found, "timeouts"),
            errors=_count(found, "errors"),
            seconds=time.monotonic() - began,
            pass_at=list(self.config.evaluation.pass_at),
        )

    def close(self) -> None:
        """Ends the processes that judge. Safe to call twice."""
        self.judge.close()

    def _answered(
        self, prompts: Sequence[Prompt], temperature: float, top_p: float, on_progress: Callable[[int, int], None],
        before: int, total: int,
    ) -> list[Rollout]:  # fmt: skip
        how = Sampling(self.config.rollout.max_new_tokens, temperature, top_p, stop_token_ids=self.stop_token_ids)
        first = self.config.seed * 1_000_003 + _SEEDS
        requests = [SampleRequest(prompt, seed=first + i, group=i) for i, prompt in enumerate(prompts)]
        answers: list[Rollout] = []
        for start in range(0, len(requests), _AT_ONCE):
            answers += self.client.sample(requests[start : start + _AT_ONCE], how)
            on_progress(before + len(answers), total)
        return answers


def _count(found: StepRewards, what: str) -> int:
    return round(found.metrics.get(f"reward/{what}", 0.0))
