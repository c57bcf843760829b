"""Answers for the next step, sampled while this one trains (`rollout.steps_ahead: 1`).

    step k          train on answers of weights k - 1        meanwhile sample those of step k + 1 with weights k
    end of step k   collect, then sync weights k + 1

So an answer is one optimizer step old when it is trained on. That it is never older is checked, and a checkpoint holds
the answers that the next step is to train on: their weights are gone when the run is resumed.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opd_megatron.data.prompts import PromptStream
from opd_megatron.errors import CheckpointError, StalePolicyError
from opd_megatron.rollout.client import RolloutClient
from opd_megatron.types import Rollout, SampleRequest, Sampling


@dataclass(slots=True)
class StepRollouts:
    """The rollouts of each step, sampled in it or during the one before."""

    client: RolloutClient
    prompts: PromptStream
    requests: Callable[[int], list[SampleRequest]]
    """Takes the next prompts and makes the requests of a step."""
    sampling: Sampling
    steps_ahead: int
    last: int
    """Steps of the run: nothing is sampled for one that does not come."""
    _ahead: list[Rollout] = field(default_factory=list)
    _cursor: Any = None
    """Where the prompts of `_ahead` begin."""
    _begun: bool = False

    def take(self, step: int) -> list[Rollout]:
        """The rollouts that a step trains on; begins with those of the next one where they are sampled ahead.

        Raises StalePolicyError when one was sampled by weights that are older than `steps_ahead`.
        """
        rollouts, self._ahead = self._ahead or self.client.sample(self.requests(step), self.sampling), []
        _check_age(rollouts, step, self.steps_ahead)
        if self.steps_ahead and step + 1 < self.last:
            self._cursor, self._begun = self.prompts.state_dict(), True
            self.client.begin(self.requests(step + 1), self.sampling)
        return rollouts

    def collect(self) -> None:
        """Waits for what is sampled ahead: before the weights are synced."""
        if self._begun:
            self._begun = False
            self._ahead = self.client.collect()

    def cursor(self) -> Any:
        """Where the prompts of the next step begin, between two steps."""
        return self._cursor if self._ahead else self.prompts.state_dict()

    def state(self) -> list[dict[str, Any]] | None:
        """The answers that the next step trains on, in JSON; None where they are not sampled yet."""
        return [_packed(rollout) for rollout in self._ahead] or None

    def restore(self, step: int, state: Sequence[dict[str, Any]] | None) -> None:
        """Takes `state` up again, with the prompts at `cursor`. A run that samples in each step needs none of it.

        Raises CheckpointError when the answers are not those of the next step's prompts.
        """
        if not state or not self.steps_ahead or step >= self.last:
            return
        self._cursor = self.prompts.state_dict()
        requests = self.requests(step)
        if len(requests) != len(state):
            raise CheckpointError(
                f"the checkpoint of step {step} holds {len(state)} answers for the next step, which now has "
                f"{len(requests)}: keep rollout.prompts_per_step and samples_per_prompt, or set rollout.steps_ahead=0"
            )
        self._ahead = [_unpacked(request, answer) for request, answer in zip(requests, state, strict=True)]


def _check_age(rollouts: Sequence[Rollout], version: int, allowed: int) -> None:
    oldest = min(rollouts, key=lambda rollout: rollout.policy_version)
    if version - oldest.policy_version > allowed:
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
