"""Held-out figures on gold answers, and the line that introduces a teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd_megatron.config import ObjectiveConfig, RunConfig
from opd_megatron.data.batching import make_micro_batches
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.student import Student, TeacherInputs
from opd_megatron.teacher.base import Teacher
from opd_megatron.types import Batch, Prompt

TokenPair = tuple[tuple[int, ...], tuple[int, ...]]

_SANITY_ROWS = 8
"""Held-out rows that introduce the teacher when evaluation is switched off."""
_SAME_MODEL_KL = 1e-3


class Evaluator:
    """Scores the student against its teachers on fixed token sequences.

    The teachers' hidden states are computed once and kept: neither they nor the sequences change.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        teachers: list[Teacher],
        grid: ParallelGrid,
        *,
        vocab_size: int,
        length_multiple: int,
        device: torch.device,
    ) -> None:
        self._teachers, self._vocab_size = teachers, vocab_size
        # Likelihoods and their distance are reported at temperature 1, whatever the objective trains at.
        self._objective = ObjectiveConfig(type="forward_kl", combine=config.objective.combine)
        rows = config.evaluation.prompts if config.evaluation.every else _SANITY_ROWS
        pairs = [_token_pair(prompt) for prompt in prompts[:rows]]
        self.num_sequences = len(pairs)
        self._micro_batches = _split(pairs, grid, config.micro_batch_size(grid.dp_size), length_multiple, device)
        self._views: list[TeacherInputs] = []

    def figures(self, student: Student) -> dict[str, float]:
        """Nats per token: `eval/forward_kl`, `eval/reverse_kl`, `eval/nll` and the teacher's `eval/teacher_nll`.

        Collective over all ranks.
        """
        if not self._views:
            self._views = [
                TeacherInputs(teacher.hidden_states(self._micro_batches), teacher.head, teacher.weight)
                for teacher in self._teachers
            ]
        means = student.evaluate(self._micro_batches, self._views, self._objective, self._vocab_size)
        return {f"eval/{name}": means[name] for name in ("forward_kl", "reverse_kl", "nll", "teacher_nll")}

    def teacher_summary(self, figures: dict[str, float], names: Sequence[str]) -> list[str]:
        """What a person should see before training: figures of the teacher, and a warning if they look wrong."""
        teacher_nll, nll, kl = figures["eval/teacher_nll"], figures["eval/nll"], figures["eval/forward_kl"]
        lines = [
            f"teacher {', '.join(names)}: NLL {teacher_nll:.3f} nats a token on {self.num_sequences} held-out answers "
            f"(student {nll:.3f}), forward KL to the student {kl:.3f}"
        ]
        if kl < _SAME_MODEL_KL:
            lines.append("warning: teacher and student agree almost exactly: is the teacher's path the student's?")
        elif teacher_nll > nll:
            lines.append("warning: the teacher finds the gold answers less likely than the student does: right model?")
        return lines


def _token_pair(prompt: Prompt) -> TokenPair:
    """(context, scored tokens). Without a gold answer the second half of the prompt is scored."""
    if prompt.answer_ids:
        return prompt.token_ids, prompt.answer_ids
    half = max(1, len(prompt.token_ids) // 2)
    return prompt.token_ids[:half], prompt.token_ids[half:]


def _split(
    pairs: list[TokenPair], grid: ParallelGrid, micro_batch_size: int, length_multiple: int, device: torch.device
) -> list[Batch]:
    """This data-parallel rank's pairs, in micro batches (of one shape if there is a pipeline)."""
    padded = pairs + pairs[: -len(pairs) % grid.dp_size]
    padded += padded[:1] * (-len(padded) % grid.dp_size)  # fewer rows than ranks
    longest = max(len(context) + len(scored) for context, scored in padded) if grid.pp_size > 1 else None
    mine = sorted(padded[grid.dp_rank :: grid.dp_size], key=lambda pair: len(pair[0]) + len(pair[1]))
    size = max(n for n in range(1, micro_batch_size + 1) if len(mine) % n == 0)
    return make_micro_batches(mine, size, length=longest, multiple_of=length_multiple, device=device)
