"""What a teacher with a prompt of its own reads: a text with columns of the row in braces.

A teacher that sees more than the student (the gold answer, a hint) can teach a student of the same weights: OPSD
(arXiv 2601.18734).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from string import Formatter

from opd_megatron.config import RunConfig
from opd_megatron.data.rows import Example
from opd_megatron.errors import ConfigError, DataError

PROMPT, ANSWER, SIBLING = "prompt", "answer", "sibling"


@dataclass(frozen=True, slots=True)
class ContextTemplate:
    """`teachers.N.prompt`, read."""

    key: str
    """`teachers.N.prompt`, for errors."""
    parts: tuple[tuple[str, str | None], ...]
    """Literal text and the column after it, None after the last."""

    @staticmethod
    def read(key: str, text: str) -> ContextTemplate:
        """Raises ConfigError for what is no template."""
        try:
            parsed = [(literal, name, spec, conversion) for literal, name, spec, conversion in Formatter().parse(text)]
        except ValueError as error:
            raise ConfigError(f"{key}={text!r} is no template ({error}): write a brace itself twice") from None
        for _, name, spec, conversion in parsed:
            if name == "" or (name is not None and (spec or conversion)):
                raise ConfigError(
                    f"{key}={text!r} has a field {'{' + name + (':' + spec if spec else '') + '}'!r} that is not the "
                    "name of a column: write {prompt}, {answer} or another column, and a brace itself twice"
                )
        return ContextTemplate(key, tuple((literal, name) for literal, name, _, _ in parsed))

    @property
    def columns(self) -> list[str]:
        """Names of the columns that it takes besides prompt and gold answer."""
        return [name for _, name in self.parts if name not in (None, PROMPT, ANSWER, SIBLING)]

    @property
    def has_sibling(self) -> bool:
        """Whether it takes another answer of the same group."""
        return any(name == SIBLING for _, name in self.parts)

    def applied_to(self, row: Example, sibling: str | None = None) -> Example:
        """The row with this text in the place of the user's (last) message; as it is where the template wants a
        `sibling` and there is none.

        Raises:
            DataError: the row has no gold answer and the template wants one.
        """
        if self.has_sibling and sibling is None:
            return row
        values = {name: sibling if name == SIBLING else self._value(row, name) for _, name in self.parts if name}
        text = "".join(literal + ("" if name is None else str(values[name])) for literal, name in self.parts)
        messages = list(row.messages)
        for place in reversed(range(len(messages))):
            if messages[place][0] == "user":
                messages[place] = ("user", text)
                break
        return dataclasses.replace(row, question=text, messages=tuple(messages))

    def _value(self, row: Example, name: str) -> str:
        if name == PROMPT:
            return row.question
        if name != ANSWER:
            return row.columns[name]
        if row.answer is None:
            raise DataError(
                f"{self.key} uses {{{ANSWER}}}, but prompt {row.id!r} has no gold answer: set data.answer_column, or "
                "leave it out"
            )
        return row.answer


def context_templates(config: RunConfig) -> dict[int, ContextTemplate]:
    """Reads the templates of the teachers that have one, by the teacher's number. Raises ConfigError."""
    found = {
        number: ContextTemplate.read(f"teachers.{number}.prompt", teacher.prompt)
        for number, teacher in enumerate(config.teachers)
        if teacher.prompt is not None
    }
    for template in found.values():
        if template.has_sibling and (not config.rewards.judges or config.rollout.samples_per_prompt == 1):
            raise ConfigError(
                f"{template.key} uses {{{SIBLING}}}, another answer to the same prompt that is right: it needs "
                "rewards.task to judge them, and rollout.samples_per_prompt of 2 or more"
            )
    return found
