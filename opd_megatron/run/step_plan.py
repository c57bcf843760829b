"""What a step trains on: which prompts, and for each whether the student samples an answer or has one given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opd_megatron.config import RunConfig
from opd_megatron.data.given_answers import GivenAnswers
from opd_megatron.data.prompts import PromptStream
from opd_megatron.types import Rollout, SampleRequest

_ROUNDING = 1e-9
"""So that 3 * (1 - 2 / 3) is one prompt."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Where the answers of a step come from."""

    requests: list[SampleRequest]
    """Of those that are sampled."""
    given: Mapping[int, Rollout] = field(default_factory=dict)
    """Their place in the step -> those that are not."""

    def whole(self, sampled: Sequence[Rollout]) -> list[Rollout]:
        """All of the step, in order."""
        answers = iter(sampled)
        places = range(len(self.requests) + len(self.given))
        return [self.given[place] if place in self.given else next(answers) for place in places]


@dataclass(frozen=True, slots=True)
class StepPlanner:
    """Takes the next prompts of a step. Every sampled sequence of a run has a seed of its own, so that an answer
    depends neither on the engine nor on the order of requests, and a resumed run draws the same one."""

    config: RunConfig
    prompts: PromptStream
    given: GivenAnswers | None

    def plan(self, step: int) -> StepPlan:
        """Plans a step, the same on every rank; moves the prompts on."""
        answers = self.config.rollout.samples_per_prompt
        first = self.config.seed * 1_000_003 + step * self.config.sequences_per_step
        left = self._given_until(step + 1) - self._given_until(step)
        requests: list[SampleRequest] = []
        given: dict[int, Rollout] = {}
        for group, prompt in enumerate(self.prompts.next_prompts()):
            source = self.given if left > 0 and self.given is not None and self.given.has(prompt) else None
            left -= source is not None
            for place in range(group * answers, (group + 1) * answers):
                found = None if source is None else source.rollout(prompt, step, place, group)
                if found is None:
                    requests.append(SampleRequest(prompt, seed=first + place, group=group))
                else:
                    given[place] = found
        return StepPlan(requests, given)

    def _given_until(self, step: int) -> int:
        """Prompts of all steps before this one whose answers are given: their share to within one."""
        share = 1 - self.config.data.on_policy_fraction
        return math.floor(step * self.prompts.prompts_per_step * share + _ROUNDING)
