"""A record of any shape to a question and its gold answer: columns, paths into columns, and lists of messages.

question / answer            plain text
prompt, reward_model.ground_truth, data_source       verl's
prompt or messages as [{"role": ..., "content": ...}, ...]       TRL's and the chat format
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd_megatron.errors import DataError
from opd_megatron.system.reading import is_text

Message = tuple[str, str]
"""Role and content."""
DEFAULT_PROMPT, DEFAULT_ANSWER = "question", "answer"
_OTHER_PROMPTS = ("prompt", "messages", "problem", "instruction")
_OTHER_ANSWERS = ("reward_model.ground_truth", "ground_truth", "solution", "response", "completion", "output")
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Example:
    """One question, before any tokenizer has seen it."""

    id: str
    question: str
    """What a person would read: of messages, the last one of the user."""
    answer: str | None = None
    messages: tuple[Message, ...] = ()
    """The conversation up to the answer, where the row has one; the question alone otherwise."""
    task: str | None = None
    """Which task it belongs to, where the data say so."""
    source: int = 0
    """Which of the run's sources it comes from."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Further columns that teachers' prompts want (`data.contexts`)."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further columns that tasks want, as they are (`data.task_rows`)."""

    @property
    def key(self) -> Any:
        """What makes it the same question as another."""
        return self.messages or self.question


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column, or path into one, holds what."""

    prompt: str = DEFAULT_PROMPT
    answer: str | None = DEFAULT_ANSWER
    task: str | None = None
    others: tuple[str, ...] = ()
    """Further ones that teachers' prompts want."""
    fields: tuple[str, ...] = ()
    """Further ones that tasks want; `name?` may be missing."""

    def found_in(self, record: Mapping[str, Any]) -> tuple[Columns, list[str]]:
        """Replaces default names that the record does not have by the usual other ones, and says so in notes."""
        prompt, answer, notes = self.prompt, self.answer, []
        if prompt == DEFAULT_PROMPT and value_at(record, prompt) is _MISSING:
            prompt = next((name for name in _OTHER_PROMPTS if value_at(record, name) is not _MISSING), prompt)
            if prompt != self.prompt:
                notes.append(f"prompts from column {prompt!r}")
        if answer == DEFAULT_ANSWER and value_at(record, answer) is _MISSING and prompt in record:
            answer = next((name for name in _OTHER_ANSWERS if value_at(record, name) is not _MISSING), None)
            if answer is not None:
                notes.append(f"gold answers from column {answer!r}")
            elif not _ends_with_answer(value_at(record, prompt)):
                notes.append("no gold answers: there is no column 'answer'")
        return replace(self, prompt=prompt, answer=answer), notes


def value_at(record: Any, path: str) -> Any:
    """Looks up a column, or a path into one such as `reward_model.ground_truth` or `messages.0.content`."""
    if isinstance(record, Mapping) and path in record:
        return record[path]
    first, dot, rest = path.partition(".")
    if not dot:
        return _item(record, first)
    inner = _item(record, first)
    return _MISSING if inner is _MISSING else value_at(inner, rest)


def _item(node: Any, key: str) -> Any:
    if isinstance(node, Mapping):
        return node.get(key, _MISSING)
    if isinstance(node, Sequence) and not isinstance(node, str) and key.isdigit() and int(key) < len(node):
        return node[int(key)]
    return _MISSING


def make_example(
    record: Mapping[str, Any], columns: Columns, row_id: str, where: str, *, task: str | None = None, source: int = 0
) -> Example:
    """Reads one row.

    Args:
        where: names the row for errors, e.g. `row 3 of 'rows.jsonl'`.
        task: of a row whose data do not name one.

    Raises:
        DataError: a column is missing, or holds something that is no text.
    """
    found = _column(record, columns.prompt, "prompt_column", where)
    messages: tuple[Message, ...] = ()
    answer: str | None = None
    if isinstance(found, Sequence) and not isinstance(found, str):
        messages, answer = _messages(found, columns.prompt, where)
        question = next((content for role, content in reversed(messages) if role == "user"), messages[-1][1])
    else:
        question = _prompt_text(found, columns.prompt, where)
    if columns.answer is not None:
        answer = _answer_text(_column(record, columns.answer, "answer_column", where), columns.answer, where)
    if columns.task is not None:
        value = _column(record, columns.task, "task_column", where)
        if not is_text(value):
            raise DataError(f"{where}: column {columns.task!r} must hold text, got {_shown(value)}: correct the row")
        task = value
    others = {name: _other_text(_column(record, name, "", where), name, where) for name in columns.others}
    wanted = {name.rstrip("?"): name.endswith("?") for name in columns.fields}
    fields = {
        name: _field(record, name, where)
        for name, may_lack in wanted.items()
        if not (may_lack and value_at(record, name) is _MISSING)
    }
    return Example(row_id, question, answer, messages, task, source, others, fields)


def _field(record: Mapping[str, Any], path: str, where: str) -> Any:
    value = value_at(record, path)
    if value is _MISSING:
        raise DataError(
            f"{where} has no column {path!r}, which the run's task wants (it has: {', '.join(map(str, record))}): use "
            "data of that task, or another rewards.task"
        )
    return value


def _column(record: Mapping[str, Any], path: str, key: str, where: str) -> Any:
    value = value_at(record, path)
    if value is _MISSING:
        hint = ", or null if there are no answers" if key == "answer_column" else ""
        remedy = f"set data.{key}{hint}" if key else "correct the teacher's prompt that names it (teachers.N.prompt)"
        raise DataError(f"{where} has no column {path!r} (it has: {', '.join(map(str, record))}): {remedy}")
    return value


def _prompt_text(value: Any, column: str, where: str) -> str:
    if isinstance(value, str) and not is_text(value):
        raise DataError(
            f"{where}: column {column!r} holds half of a surrogate pair, which is no text, in {_shown(value)}: correct "
            "the row"
        )
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: column {column!r} must hold text or a list of messages, got {_shown(value)}: correct the row or "
            "set data.prompt_column"
        )
    return value


def _answer_text(value: Any, column: str, where: str) -> str | None:
    """Numbers are written as text; anything else that is no text is refused, or would be trained towards."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        inside = next(iter(value), None) if isinstance(value, Mapping) else None
        path = "" if inside is None else f" (a path into it such as {column}.{inside})"
        raise DataError(
            f"{where}: column {column!r} must hold text or a number, got {_shown(value)}: correct the row, or set "
            f"data.answer_column to another column{path}, or to null"
        )
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(
                f"{where}: column {column!r} holds {value}, no answer: leave the cell empty, or correct the row"
            )
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if isinstance(value, str) and not is_text(value):
        raise DataError(
            f"{where}: column {column!r} holds half of a surrogate pair, which is no text, in {_shown(value)}: correct "
            "the row"
        )
    return str(value)


def _other_text(value: Any, column: str, where: str) -> str:
    if (
        isinstance(value, bool)
        or not isinstance(value, str | int | float)
        or (isinstance(value, str) and not is_text(value))
    ):
        raise DataError(
            f"{where}: column {column!r}, which a teacher's prompt names, must hold text or a number, got "
            f"{_shown(value)}: correct the row, or the prompt (teachers.N.prompt)"
        )
    return str(value)


def _messages(found: Sequence[Any], column: str, where: str) -> tuple[tuple[Message, ...], str | None]:
    """Reads a conversation. What the assistant says last is the gold answer."""
    messages = [_message(message, column, where) for message in found]
    answer = messages.pop()[1] if messages and messages[-1][0] == "assistant" else None
    if not any(role == "user" for role, _ in messages):
        raise DataError(
            f"{where}: column {column!r} must hold messages with one of the role 'user', has the roles "
            f"{', '.join(role for role, _ in messages) or 'of none'}: correct the row"
        )
    return tuple(messages), answer


def _message(message: Any, column: str, where: str) -> Message:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts, as vision models have them
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if parts and len(texts) == len(parts) else None
    if not is_text(role) or not is_text(content):
        raise DataError(
            f"{where}: column {column!r} must hold messages of a role and a text content, got {_shown(message)}: "
            "correct the row or set data.prompt_column"
        )
    if message.get("tool_calls"):
        raise DataError(
            f"{where}: column {column!r} has a message with tool_calls, which are not read: leave the row out"
        )
    assert isinstance(role, str)
    assert isinstance(content, str)
    return role, content


def _ends_with_answer(value: Any) -> bool:
    last = value[-1] if isinstance(value, Sequence) and not isinstance(value, str) and value else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def _shown(value: Any) -> str:
    return ascii(value)[:60]
