"""Held-out metrics on gold answers, and the lines that describe a teacher before it has taught anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from opd_megatron.config import ObjectiveConfig, RunConfig
from opd_megatron.data.batching import MicroBatchBuilder
from opd_megatron.errors import NonFiniteError
from opd_megatron.mcore.student import Student
from opd_megatron.teacher import Teacher, Views, ask_teachers
from opd_megatron.types import Prompt, Rollout, TeacherInputs

_SANITY_ROWS = 8
"""Held-out rows that describe the teacher when evaluation is switched off."""
_SAME_MODEL_KL = 1e-3


class Evaluator:
    """Scores the student against its teachers on fixed token sequences.

    The teachers are asked once and their answers kept, unless they change: the sequences do not.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        teachers: list[Teacher],
        batches: MicroBatchBuilder,
        views: Views,
        vocab_size: int,
    ) -> None:
        self._teachers, self._views, self._vocab_size = teachers, views, vocab_size
        # Likelihoods and their distance are reported at temperature 1, whatever the objective trains at.
        paths = [each.path for number, each in enumerate(config.teachers) if number != config.reference]
        self._taught_by = ", ".join(paths)
        with_teachers = ObjectiveConfig(type="forward_kl", combine=config.objective.combine)
        self._objective = with_teachers if paths else ObjectiveConfig(type="sft")
        answers = evaluated(config, prompts)
        self.num_sequences = len(answers)
        self._batches = batches
        self._micro_batches = batches.build_any_number(answers)
        self._inputs: list[TeacherInputs] = []

    def evaluate(self, student: Student) -> dict[str, float]:
        """Measures in nats per token: `eval/nll` and, with a teacher, `eval/forward_kl`, `eval/reverse_kl` and the
        teacher's `eval/teacher_nll`.

        Collective over all ranks.
        """
        if not self._inputs:
            asked = ask_teachers(self._teachers, self._micro_batches, self._views)
            self._inputs = [
                replace(each, outputs=list(each.outputs), meter=None) for each in asked if not each.reference
            ]  # fmt: skip
        means = student.evaluate(self._micro_batches, self._inputs, self._objective, self._vocab_size)
        if any(teacher.changes for teacher in self._teachers):
            self._inputs = []
        for who, name in (("student", "nll"), ("teacher", "teacher_nll")):
            if name in means and not math.isfinite(means[name]):
                remedy = "take other weights" if who == "student" else "download it again"
                raise NonFiniteError(
                    f"the {who} gives held-out answers {means[name]} nats a token: its weights hold NaN or infinite "
                    f"values, {remedy}"
                )
        names = ("forward_kl", "reverse_kl", "nll", "teacher_nll")
        return {f"eval/{name}": means[name] for name in names if name in means}

    def likelihoods(
        self, student: Student, sequence: Rollout, teacher: Teacher, number: int | None = None
    ) -> dict[str, float]:
        """Measures `nll` and one teacher's `teacher_nll` of one sequence, in nats per token of its response.
        Collective.

        `number`: of the teacher, which reads the sequence in its own tokens where its tokenizer is another.
        """
        batches = self._batches.build_any_number([sequence])
        shown, view = batches, None
        if number is not None and number in self._views.pairs:
            shown, view = self._views.of(number, batches, routed=False)
        inputs = [replace(each, view=view) for each in ask_teachers([teacher], shown)]
        return student.evaluate(batches, inputs, ObjectiveConfig(type="forward_kl"), self._vocab_size)

    def summary(self, metrics: dict[str, float]) -> list[str]:
        """Tells what `metrics` of the untrained student say of the teacher, with a warning if they look wrong."""
        if not self._taught_by:
            return [f"student: NLL {metrics['eval/nll']:.3f} nats a token on {self.num_sequences} held-out answers"]
        teacher_nll, nll, kl = metrics["eval/teacher_nll"], metrics["eval/nll"], metrics["eval/forward_kl"]
        lines = [
            f"teacher {self._taught_by}: NLL {teacher_nll:.3f} nats a token on {self.num_sequences} held-out answers "
            f"(student {nll:.3f}), forward KL to the student {kl:.3f}"
        ]
        if kl < _SAME_MODEL_KL:
            lines.append("warning: teacher and student agree almost exactly: is the teacher's path the student's?")
        elif teacher_nll > nll:
            lines.append("warning: the teacher finds the gold answers less likely than the student does: right model?")
        return lines


def evaluated(config: RunConfig, prompts: Sequence[Prompt]) -> list[Rollout]:
    """Selects what is scored of `prompts`: the held-out ones, or such as stand in for them."""
    return [
        gold(prompt) for prompt in prompts[: config.evaluation.prompts if config.evaluation.every else _SANITY_ROWS]
    ]


def gold(prompt: Prompt) -> Rollout:
    """Treats the gold answer as if it had been sampled. Without one, the second half of the prompt is scored."""
    if prompt.answer_ids:
        return Rollout(prompt, torch.tensor(prompt.answer_ids), None, policy_version=-1)
    half = max(1, len(prompt.token_ids) // 2)
    context, scored = prompt.token_ids[:half], prompt.token_ids[half:]
    return Rollout(replace(prompt, token_ids=context, contexts={}), torch.tensor(scored), None, policy_version=-1)
