"""Answers that the student has not sampled: gold ones of the data, or ones that a run has saved (a teacher's, or an
earlier student's). Training on a share of them is GKD's mixture (arXiv 2306.13649); on them alone, distillation on a
fixed data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from opd_megatron.config import GOLD, DataConfig
from opd_megatron.data.rows import Example
from opd_megatron.data.saved_rollouts import read_rollouts
from opd_megatron.errors import DataError
from opd_megatron.types import Prompt, Rollout


@dataclass(frozen=True, slots=True)
class GivenAnswers:
    """Looks an answer to a prompt up."""

    seed: int
    saved: Mapping[str, Sequence[Rollout]] | None
    """By the prompt's id; None for gold answers."""
    longest: int
    """Tokens of an answer: what is longer is cut."""

    @staticmethod
    def of(data: DataConfig, *, seed: int, longest: int) -> GivenAnswers | None:
        """Reads `data.answers`; None where every answer is sampled. Raises MissingPathError and DataError."""
        if data.on_policy_fraction == 1:
            return None
        if data.answers == GOLD:
            return GivenAnswers(seed, None, longest)
        saved: dict[str, list[Rollout]] = {}
        for rollout in read_rollouts(Path(data.answers)):
            saved.setdefault(rollout.prompt.id, []).append(rollout)
        return GivenAnswers(seed, saved, longest)

    def has(self, row: Example | Prompt) -> bool:
        """Whether there is an answer to a row."""
        return row.answer is not None if self.saved is None else row.id in self.saved

    def rollout(self, prompt: Prompt, step: int, place: int, group: int) -> Rollout | None:
        """The answer at a place of a step: of several one that depends on seed, step and place alone. None where there
        is none."""
        ids = prompt.answer_ids
        if self.saved is not None:
            found = self.saved.get(prompt.id)
            ids = None
            if found:
                chosen = int(np.random.default_rng((self.seed, step, place)).integers(len(found)))
                ids = tuple(found[chosen].response_ids.tolist())
        if not ids:
            return None
        return Rollout(prompt, torch.tensor(ids[: self.longest]), None, policy_version=-1, group=group)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Makes sure that saved answers are to these very prompts. Raises DataError."""
        known = {prompt.id: prompt.token_ids for prompt in prompts}
        for prompt_id, rollouts in (self.saved or {}).items():
            other = next((each for each in rollouts if each.prompt.token_ids != known.get(prompt_id)), None)
            if prompt_id in known and other is not None:
                raise DataError(
                    f"the saved answer to prompt {prompt_id!r} belongs to another prompt of that name: use the data, "
                    "tokenizer and template of the run that saved it"
                )

    def fingerprint(self) -> str:
        """Hashes the saved answers."""
        digest = sha256()
        for prompt_id, rollouts in sorted((self.saved or {}).items()):
            digest.update(repr((prompt_id, [each.response_ids.tolist() for each in rollouts])).encode())
        return digest.hexdigest()[:32]
