"""Answers for the next step, sampled while this one trains (`rollout.steps_ahead: 1`).

    step k          train on answers of weights k - 1        meanwhile sample those of step k + 1 with weights k
    end of step k   collect, then sync weights k + 1

So an answer is one optimizer step old when it is trained on. That it is never older is checked, and a checkpoint holds
the answers that the next step is to train on: their weights are gone when the run is resumed.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opd_megatron.data.prompts import PromptStream
from opd_megatron.errors import CheckpointError, StalePolicyError
from opd_megatron.rollout.client import RolloutClient
from opd_megatron.run.step_plan import StepPlan
from opd_megatron.types import Rollout, SampleRequest, Sampling


@dataclass(slots=True)
class StepRollouts:
    """The rollouts of each step, sampled in it or during the one before."""

    client: RolloutClient
    prompts: PromptStream
    plan: Callable[[int], StepPlan]
    """Takes the next prompts and plans a step with them."""
    sampling: Sampling
    steps_ahead: int
    last: int
    """Steps of the run: nothing is sampled for one that does not come."""
    _ahead: tuple[StepPlan, list[Rollout]] | None = None
    _cursor: Any = None
    """Where the prompts of `_ahead` begin."""
    _begun: StepPlan | None = None

    def take(self, step: int) -> list[Rollout]:
        """The rollouts that a step trains on; begins with those of the next one where they are sampled ahead.

        Raises StalePolicyError when one was sampled by weights that are older than `steps_ahead`.
        """
        plan, sampled = self._ahead or self._sample(self.plan(step))
        self._ahead = None
        _check_age(sampled, step, self.steps_ahead)
        if self.steps_ahead and step + 1 < self.last:
            self._cursor = self.prompts.state_dict()
            self._begun = self.plan(step + 1)
            if self._begun.requests:
                self.client.begin(self._begun.requests, self.sampling)
        return plan.whole(sampled)

    def collect(self) -> None:
        """Waits for what is sampled ahead: before the weights are synced."""
        if self._begun is not None:
            plan, self._begun = self._begun, None
            self._ahead = plan, self.client.collect() if plan.requests else []

    def cursor(self) -> Any:
        """Where the prompts of the next step begin, between two steps."""
        return self.prompts.state_dict() if self._ahead is None else self._cursor

    def state(self) -> list[dict[str, Any]] | None:
        """The answers that the next step trains on, in JSON; None where they are not sampled yet."""
        return None if self._ahead is None else [_packed(rollout) for rollout in self._ahead[1]] or None

    def restore(self, step: int, state: Sequence[dict[str, Any]] | None) -> None:
        """Takes `state` up again, with the prompts at `cursor`. A run that samples in each step needs none of it.

        Raises CheckpointError when the answers are not those of the next step's prompts.
        """
        if not state or not self.steps_ahead or step >= self.last:
            return
        self._cursor = self.prompts.state_dict()
        plan = self.plan(step)
        if len(plan.requests) != len(state):
            raise CheckpointError(
                f"the checkpoint of step {step} holds {len(state)} answers for the next step, which now has "
                f"{len(plan.requests)}: keep rollout.prompts_per_step and samples_per_prompt, or set "
                "rollout.steps_ahead=0"
            )
        self._ahead = plan, [_unpacked(request, answer) for request, answer in zip(plan.requests, state, strict=True)]

    def _sample(self, plan: StepPlan) -> tuple[StepPlan, list[Rollout]]:
        return plan, self.client.sample(plan.requests, self.sampling) if plan.requests else []


def _check_age(rollouts: Sequence[Rollout], version: int, allowed: int) -> None:
    oldest = min(rollouts, key=lambda rollout: rollout.policy_version, default=None)
    if oldest is not None and version - oldest.policy_version > allowed:
        raise StalePolicyError(
            f"the answer to prompt {oldest.prompt.id!r} was sampled by policy version {oldest.policy_version}, but "
            f"version {version} is being trained and rollout.steps_ahead={allowed}: sync the weights before sampling"
        )


def _packed(rollout: Rollout) -> dict[str, Any]:
    assert rollout.logprobs is not None
    return {
        "prompt": rollout.prompt.id,
        "ids": _text(rollout.response_ids.to(torch.int32)),
        "logprobs": _text(rollout.logprobs.to(torch.float32)),
        "version": rollout.policy_version,
        "reason": rollout.finish_reason,
    }


def _unpacked(request: SampleRequest, answer: dict[str, Any]) -> Rollout:
    try:
        if answer["prompt"] != request.prompt.id:
            raise CheckpointError(
                f"the checkpoint holds an answer to prompt {answer['prompt']!r} where the next one is "
                f"{request.prompt.id!r}: its state is damaged, remove it to resume from the one before"
            )
        return Rollout(
            request.prompt,
            _tensor(answer["ids"], torch.int32).to(torch.int64),
            _tensor(answer["logprobs"], torch.float32),
            int(answer["version"]),
            str(answer["reason"]),
            group=request.group,
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the checkpoint's answers for the next step are damaged ({error!r}): remove it to resume from the one "
            "before"
        ) from None


def _text(values: torch.Tensor) -> str:
    return base64.b64encode(values.numpy().tobytes()).decode()


def _tensor(text: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=dtype)
