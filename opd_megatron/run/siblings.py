"""What a teacher reads whose prompt has a `{sibling}`: another answer to the same question, which was judged right.

The student's own success shows the teacher, often the student itself, how it goes (SDPO, arXiv 2601.20802). Where the
group has none, the teacher reads what the student does.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd_megatron.data.prompts import PromptDataset
from opd_megatron.rewards import StepRewards
from opd_megatron.types import Rollout

SUCCESS = 0.5
"""Score above which an answer is one."""


@dataclass(frozen=True, slots=True)
class Siblings:
    """Of a run whose teachers have such prompts. The same on every rank."""

    dataset: PromptDataset
    tokenizer: Any
    """The student's, which wrote the answers."""
    rooms: Mapping[int, int]
    """Tokens that a prompt may have in the context of each teacher, by its number."""

    def shown(self, rollouts: Sequence[Rollout], scored: StepRewards) -> tuple[list[Rollout], dict[str, float]]:
        """Gives every answer that has one its sibling to read; returns them and the share that has one."""
        groups: dict[int, list[int]] = {}
        for i, each in enumerate(rollouts):
            if scored.scores[i] > SUCCESS:
                groups.setdefault(each.group, []).append(i)
        texts = {i: self._text(rollouts[i]) for found in groups.values() for i in found}
        shown, with_one = [], 0
        for i, each in enumerate(rollouts):
            other = _next_after(i, groups.get(each.group, []))
            contexts = {} if other is None else self._contexts(each, texts[other])
            with_one += bool(contexts)
            shown.append(replace(each, prompt=replace(each.prompt, contexts={**each.prompt.contexts, **contexts})))
        return shown, {"reward/siblings": with_one / max(1, len(rollouts))}

    def _contexts(self, rollout: Rollout, text: str) -> dict[int, tuple[int, ...]]:
        found = self.dataset.contexts_with(rollout.prompt.id, text)
        return {number: ids for number, ids in found.items() if len(ids) <= self.rooms.get(number, sys.maxsize)}

    def _text(self, rollout: Rollout) -> str:
        try:
            text: str = self.tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True)
        except Exception:  # tokens that make no text show nothing
            return ""
        return text


def _next_after(place: int, successes: Sequence[int]) -> int | None:
    """Another success of the group, the next one round from this answer; None where there is no other."""
    others = [i for i in successes if i != place]
    return next((i for i in others if i > place), others[0] if others else None)
