"""Rows of questions and gold answers: made offline, from a JSON lines file, or from a data set hub.

Held-out rows never share a question with the training rows, whatever the source.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.config import DataConfig, RunConfig
from opd_megatron.errors import DataError, MissingPathError, one_line

GSM_SYMBOLIC = "gsm_symbolic"
GSM_SYMBOLIC_ROWS = 4096
FILE_SUFFIXES = (".jsonl", ".json", ".ndjson")
DEFAULT_SUBSETS = {"openai/gsm8k": "main"}
DEFAULT_ANSWER_COLUMN = "answer"


@dataclass(frozen=True, slots=True)
class Example:
    """One question, before any tokenizer has seen it."""

    id: str
    question: str
    answer: str | None = None


def train_and_eval_rows(config: RunConfig) -> tuple[list[Example], list[Example]]:
    """Reads training rows, and up to `evaluation.prompts` held-out rows that have a gold answer.

    Held-out rows come from `data.eval_source`, else from the source itself: another random stream for
    `gsm_symbolic`, the `eval_split` of a hub data set, and for a file its last rows (at most a fifth of it).
    There are none when evaluation is off, or when neither an answer column nor an eval source is set.

    Raises:
        MissingPathError: a source cannot be found or reached.
        DataError: a source is empty, malformed, or lacks a column.
    """
    data = config.data
    wanted = config.evaluation.prompts if config.evaluation.every else 0
    if data.answer_column is None and data.eval_source is None:
        wanted = 0
    from_file = _is_file(data.source)
    rows = _read(data, data.source, data.split, data.answer_column, seed=2 * config.seed)
    train = list(itertools.islice(rows, data.limit))
    if not train:
        raise DataError(f"data source {data.source!r} (split {data.split!r}) has no rows: give one that has some")
    if wanted and from_file and data.eval_source in (None, data.source):
        train, held_out = _split_file(train, wanted, data.source)
    elif wanted:
        held_out = _held_out_rows(config, wanted)
    else:
        held_out = []
    questions = {row.question for row in held_out}
    train = [row for row in train if row.question not in questions]
    if not train:
        raise DataError(f"every row of {data.source!r} is also held out for evaluation: give another data.eval_source")
    return train, held_out


def _held_out_rows(config: RunConfig, wanted: int) -> list[Example]:
    data = config.data
    source = data.eval_source or data.source
    column = data.answer_column or DEFAULT_ANSWER_COLUMN
    rows: list[Example] = []
    for row in _read(data, source, data.eval_split, column, seed=2 * config.seed + 1):
        if row.answer is not None:
            rows.append(row)
        if len(rows) == wanted:
            break
    if not rows:
        raise DataError(
            f"evaluation source {source!r} has no row with an answer in column {column!r}: give another "
            "data.eval_source, or switch evaluation off with evaluation.every=0"
        )
    return rows


def _split_file(rows: list[Example], wanted: int, source: str) -> tuple[list[Example], list[Example]]:
    count = min(wanted, max(1, len(rows) // 5))
    if len(rows) < 2:
        raise DataError(
            f"{source!r} has one row, which cannot be trained on and held out: set data.eval_source, or switch "
            "evaluation off with evaluation.every=0"
        )
    held_out = [row for row in rows[-count:] if row.answer is not None]
    if not held_out:
        raise DataError(
            f"the last {count} rows of {source!r}, which are held out for evaluation, have no answer: set "
            "data.eval_source, or switch evaluation off with evaluation.every=0"
        )
    return rows[:-count], held_out


def _read(data: DataConfig, source: str, split: str, answer_column: str | None, seed: int) -> Iterator[Example]:
    if source == GSM_SYMBOLIC:
        yield from gsm_symbolic_rows(seed, GSM_SYMBOLIC_ROWS)
        return
    records = read_json_lines(Path(source)) if _is_file(source) else read_hub(source, data.subset, split)
    name = Path(source).stem if _is_file(source) else source
    for index, record in records:
        yield _row(record, f"{name}:{index}", source, index, data.prompt_column, answer_column)


def _row(
    record: Mapping[str, Any], row_id: str, source: str, index: int, prompt_column: str, answer_column: str | None
) -> Example:
    for column, key in ((prompt_column, "prompt_column"), (answer_column, "answer_column")):
        if column is not None and column not in record:
            raise DataError(
                f"row {index} of {source!r} has no column {column!r} (it has: {', '.join(map(str, record))}): set "
                f"data.{key}" + ("" if key == "prompt_column" else ", or null if there are no answers")
            )
    question = record[prompt_column]
    if not isinstance(question, str) or not question.strip():
        raise DataError(
            f"row {index} of {source!r}: column {prompt_column!r} must hold text, got {str(question)[:40]!r}: correct "
            "the row or set data.prompt_column"
        )
    answer = record[answer_column] if answer_column is not None else None
    return Example(row_id, question, None if answer is None else str(answer))


def gsm_symbolic_rows(seed: int, count: int) -> Iterator[Example]:
    """Makes up to `count` distinct grade-school problems with worked answersoffline with reasoning-gym.

    The same seed gives the same rows; different seeds share no random stream (the generator draws row i from
    seed + i, hence the stride), though a short template may still give the same question twice.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a package that it imports
        if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
            # A SAT solver of other puzzles, left out of the environment because it needs a C compiler.
            sys.modules["pycosat"] = types.ModuleType("pycosat")
        import reasoning_gym  # slow to import, and only this source needs it

    problems = reasoning_gym.create_dataset(GSM_SYMBOLIC, seed=seed * 1_000_003, size=count)
    seen: set[str] = set()
    for index in range(count):
        problem = problems[index]
        if problem["question"] not in seen:
            seen.add(problem["question"])
            yield Example(f"{GSM_SYMBOLIC}:{index}", problem["question"], problem["metadata"]["answer_cot"])


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, object) of every non-empty line; a .json file may hold one array of objects instead.

    Raises MissingPathError, or DataError naming file and line.
    """
    if not path.is_file():
        raise MissingPathError(f"data file {str(path)!r} does not exist: give a .jsonl file, a hub id or gsm_symbolic")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data file {str(path)!r} is not UTF-8 (byte {error.start}): convert it") from None
    lines: Iterable[tuple[int, Any]]
    if path.suffix == ".json" and text.lstrip().startswith("["):
        lines = enumerate(_parse(text, str(path)), start=1)
    else:
        lines = (
            (number, _parse(line, f"{path} line {number}"))
            # Not splitlines(): JSON texts may hold U+2028 and other line ends that are not its own.
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        )
    for index, (number, record) in enumerate(lines):
        if not isinstance(record, dict):
            raise DataError(
                f"{str(path)!r} line {number} must be a JSON object, got {type(record).__name__}: "
                'write it as {"question": ..., "answer": ...}'
            )
        yield index, record


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where!r} is not valid JSON ({error.msg} at column {error.colno}): correct it there, one object a line"
        ) from None


def read_hub(source: str, subset: str | None, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, row) of a data set on the Hugging Face hub, in its cache, or in a local data set folder."""
    import datasets  # slow to import, and only this source needs it

    subset = subset or DEFAULT_SUBSETS.get(source)
    try:
        rows = datasets.load_dataset(source, name=subset, split=split)
    except ValueError as error:
        raise DataError(
            f"data set {source!r} has no subset {subset!r} with split {split!r} ({one_line(error)}): set data.subset, "
            "data.split or data.eval_split"
        ) from None
    except Exception as error:  # the hub client raises many types, network errors among them
        raise MissingPathError(
            f"cannot load data set {source!r} ({one_line(error)}): check the name and the network, or use a local "
            ".jsonl file or data.source=gsm_symbolic"
        ) from None
    yield from enumerate(rows)


def _is_file(source: str) -> bool:
    return source.endswith(FILE_SUFFIXES)
