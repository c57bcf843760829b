"""Where rows come from: made offline, a file, a data set folder or a data set hub; one source or several.

Held-out rows never share a question with the training rows, whatever the source.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opd_megatron.config import DataConfig, RunConfig
from opd_megatron.data.contexts import context_templates
from opd_megatron.data.files import Record, is_file, name_of, read_records
from opd_megatron.data.rows import DEFAULT_ANSWER, DEFAULT_PROMPT, Columns, Example, make_example
from opd_megatron.data.task_rows import columns_of, evaluated_by, instructed, need_answers, trained_by
from opd_megatron.errors import DataError, MissingPathError, OPDError, one_line
from opd_megatron.system.reading import user_path
from opd_megatron.tasks import reasoning, task_named

__all__ = ["Example", "Rows", "gsm_symbolic_rows", "read_rows", "train_and_eval_rows"]

GSM_SYMBOLIC = "gsm_symbolic"
GSM_SYMBOLIC_ROWS = 4096
DEFAULT_SUBSETS = {"openai/gsm8k": "main"}


@dataclass(frozen=True, slots=True)
class Source:
    """One place to read rows from, with what `data:` says of all of them filled in."""

    name: str
    subset: str | None
    split: str
    columns: Columns
    task: str | None
    weight: float
    index: int
    answers: bool = True
    """Whether the user expects gold answers."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of a source that makes its rows."""
    made: int = GSM_SYMBOLIC_ROWS
    """How many it makes."""


@dataclass(slots=True)
class Rows:
    """What the sources of a run hold."""

    train: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """Share of the prompts that each source gets, relative to the others."""
    notes: list[str] = field(default_factory=list)
    """What was found otherwise than named."""


def train_and_eval_rows(config: RunConfig) -> tuple[list[Example], list[Example]]:
    """Reads training rows and held-out rows: `read_rows` without what else it tells."""
    rows = read_rows(config)
    return rows.train, rows.held_out


def read_rows(config: RunConfig) -> Rows:
    """Reads training rows, and up to `evaluation.rows` held-out rows, which have a gold answer unless only a task that
    needs none judges them.

    Held-out rows come from `data.eval_source`, else from the sources themselves: another random stream for
    `gsm_symbolic`, the `eval_split` of a hub data set, and for a file its last rows (at most a fifth of it).
    There are none when evaluation is off, or when there are no answers and no eval source.

    Raises:
        MissingPathError: a source cannot be found or reached.
        DataError: a source is empty, malformed, or lacks a column.
    """
    data, rows = config.data, Rows()
    others = tuple(dict.fromkeys(name for each in context_templates(config).values() for name in each.columns))
    fields = columns_of(trained_by(config))
    if data.eval_source in (None, data.source):  # held-out rows are some of the same
        fields = tuple(dict.fromkeys((*fields, *columns_of(evaluated_by(config)))))
    sources = _sources(data, others, fields)
    rows.weights = [source.weight for source in sources]
    wanted = config.evaluation.rows
    own = wanted if data.eval_source is None else 0
    for source, share in zip(sources, _shares(own, rows.weights), strict=True):
        share = share if source.answers or not need_answers(config) else 0
        train, held_out = _read_source(config, source, share, rows.notes)
        rows.train += train
        rows.held_out += held_out
    if data.eval_source is not None and wanted:
        rows.held_out, rows.train = _from_eval_source(config, sources[0], wanted, rows)
    kept_apart = {row.key for row in rows.held_out}
    rows.train = [row for row in rows.train if row.key not in kept_apart]
    for source in sources:
        if not any(row.source == source.index for row in rows.train):
            raise DataError(
                f"every row of {source.name!r} is also held out for evaluation: give another data.eval_source"
            )
    for part, judges in ((rows.train, trained_by(config)), (rows.held_out, evaluated_by(config))):
        part[:] = [instructed(judges, row) for row in part]
    return rows


def _shares(count: int, weights: list[float]) -> list[int]:
    """Divides `count` held-out rows among the sources; while there are enough, every source has one."""
    shares = [min(1, count)] * len(weights) if count >= len(weights) else [0] * len(weights)
    for taken in range(sum(shares), count):
        wanted = [weight / sum(weights) * (taken + 1) - share for weight, share in zip(weights, shares, strict=True)]
        shares[wanted.index(max(wanted))] += 1
    return shares


def _sources(data: DataConfig, others: tuple[str, ...], fields: tuple[str, ...]) -> list[Source]:
    if not data.sources:
        columns = Columns(data.prompt_column, data.answer_column, data.task_column, others, fields)
        return [
            Source(
                data.source, data.subset, data.split, columns, None, 1.0, 0, data.answer_column is not None,
                data.source_arguments, data.limit or GSM_SYMBOLIC_ROWS,
            )
        ]  # fmt: skip
    return [
        Source(
            one.source,
            one.subset,
            one.split or data.split,
            Columns(
                one.prompt_column or data.prompt_column,
                one.answer_column or data.answer_column,
                data.task_column,
                others,
                fields,
            ),
            one.source if one.task is None else one.task,
            one.weight,
            index,
            (one.answer_column or data.answer_column) is not None,
            one.source_arguments or data.source_arguments,
            data.limit or GSM_SYMBOLIC_ROWS,
        )
        for index, one in enumerate(data.sources)
    ]


def _read_source(
    config: RunConfig, source: Source, wanted: int, notes: list[str]
) -> tuple[list[Example], list[Example]]:
    """Reads the training rows of one source, and `wanted` of it for evaluation."""
    rows = _read(source, source.split, seed=2 * config.seed, notes=notes)
    train = list(itertools.islice(rows, config.data.limit))
    if not train:
        raise DataError(f"data source {source.name!r} (split {source.split!r}) has no rows: give one that has some")
    bare = any(note.startswith(f"{source.name}: no gold answers") for note in notes)
    if wanted and bare and need_answers(config):
        return train, []  # prompts alone, as they come: there is nothing to hold out for
    if wanted and is_file(source.name):
        return _split_file(train, wanted, source.name, need_answers(config))
    return train, _held_out(config, source, wanted) if wanted else []


def _from_eval_source(config: RunConfig, first: Source, wanted: int, rows: Rows) -> tuple[list[Example], list[Example]]:
    """Reads held-out rows from `data.eval_source`; one that is the training file itself is split."""
    name = config.data.eval_source
    assert name is not None
    if name == first.name and is_file(name):
        own = [row for row in rows.train if row.source == 0]
        train, held_out = _split_file(own, wanted, name, need_answers(config))
        return held_out, train + [row for row in rows.train if row.source != 0]
    data, columns = config.data, first.columns
    answer = data.eval_answer_column or columns.answer or (DEFAULT_ANSWER if need_answers(config) else None)
    columns = replace(columns, answer=answer, prompt=data.eval_prompt_column or columns.prompt)
    evaluated = Source(
        name, data.eval_subset or data.subset, data.eval_split, columns, None, 1.0, 0, arguments=data.source_arguments,
        made=max(GSM_SYMBOLIC_ROWS, wanted),
    )  # fmt: skip
    return _held_out(config, evaluated, wanted), rows.train


def _held_out(config: RunConfig, source: Source, wanted: int) -> list[Example]:
    rows: list[Example] = []
    source = replace(source, columns=replace(source.columns, fields=columns_of(evaluated_by(config))))
    for row in _read(source, config.data.eval_split, seed=2 * config.seed + 1, notes=[]):
        if row.answer is not None or not need_answers(config):
            rows.append(row)
        if len(rows) == wanted:
            break
    if not rows:
        raise DataError(
            f"evaluation source {source.name!r} has no row with an answer in column {source.columns.answer!r}: give "
            "another data.eval_source, or switch evaluation off with evaluation.every=0"
        )
    return rows


def _split_file(rows: list[Example], wanted: int, source: str, answers: bool) -> tuple[list[Example], list[Example]]:
    count = min(wanted, max(1, len(rows) // 5))
    if len(rows) < 2:
        raise DataError(
            f"{source!r} has one row, which cannot be trained on and held out: set data.eval_source, or switch "
            "evaluation off with evaluation.every=0"
        )
    held_out = [row for row in rows[-count:] if row.answer is not None or not answers]
    if not held_out:
        raise DataError(
            f"the last {count} rows of {source!r}, which are held out for evaluation, have no answer: set "
            "data.eval_source, or switch evaluation off with evaluation.every=0"
        )
    return rows[:-count], held_out


def _read(source: Source, split: str, seed: int, notes: list[str]) -> Iterator[Example]:
    if source.name.startswith(reasoning.PREFIX):
        yield from _reasoning_rows(source, seed, notes)
        return
    if source.name == GSM_SYMBOLIC:
        if source.columns.others:
            raise DataError(
                f"rows of {GSM_SYMBOLIC} have no column {source.columns.others[0]!r}, which a teacher's prompt names: "
                "use {prompt} and {answer} alone (teachers.N.prompt)"
            )
        for row in gsm_symbolic_rows(seed, source.made):
            yield Example(row.id, row.question, row.answer, (), source.task, source.index)
        return
    from_file = is_file(source.name)
    records = read_records(source.name) if from_file else read_hub(source.name, source.subset, split)
    name, columns = name_of(source.name) if from_file else source.name, source.columns
    for index, (where, record) in enumerate(records):
        if index == 0:
            columns, found = columns.found_in(record)
            notes.extend(f"{source.name}: {note}" for note in found)
        yield make_example(
            record, columns, f"{name}:{index}", f"row {index} of {source.name!r} ({where})", task=source.task,
            source=source.index,
        )  # fmt: skip


def _reasoning_rows(source: Source, seed: int, notes: list[str]) -> Iterator[Example]:
    try:
        task_named(source.name)
        records = reasoning.questions(source.name, seed, source.made, source.arguments)
        columns = replace(source.columns, prompt=DEFAULT_PROMPT, answer=DEFAULT_ANSWER)
        for index, record in enumerate(records):
            where = f"question {index} of {source.name!r}"
            yield make_example(record, columns, f"{source.name}:{index}", where, task=source.task, source=source.index)
    except ValueError as error:
        if isinstance(error, OPDError):
            raise
        raise DataError(f"data source {source.name!r}: {error}: correct data.source_arguments") from None


def gsm_symbolic_rows(seed: int, count: int) -> Iterator[Example]:
    """Makes up to `count` distinct grade-school problems with worked answers offline with reasoning-gym.

    The same seed gives the same rows; different seeds share no random stream (the generator draws row i from
    seed + i, hence the stride), though a short template may still give the same question twice.
    """
    problems = reasoning.library().create_dataset(GSM_SYMBOLIC, seed=seed * 1_000_003, size=count)
    seen: set[str] = set()
    for index in range(count):
        problem = problems[index]
        if problem["question"] not in seen:
            seen.add(problem["question"])
            yield Example(f"{GSM_SYMBOLIC}:{index}", problem["question"], problem["metadata"]["answer_cot"])


def read_hub(source: str, subset: str | None, split: str) -> Iterator[Record]:
    """Rows of a data set on the Hugging Face hub, in its cache, or in a local folder of files or of a saved set."""
    import datasets  # slow to import, and only this source needs it

    subset = subset or DEFAULT_SUBSETS.get(source)
    folder = user_path(source)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            rows = saved[split] if isinstance(saved, dict) else saved
        else:
            rows = datasets.load_dataset(str(folder) if folder.is_dir() else source, name=subset, split=split)
    except (ValueError, KeyError) as error:
        raise DataError(
            f"data set {source!r} has no subset {subset!r} with split {split!r} ({one_line(error)}): set data.subset, "
            "data.split or data.eval_split"
        ) from None
    except Exception as error:  # the hub client raises many types, network errors among them
        raise MissingPathError(
            f"cannot load data set {source!r} ({one_line(error)}): check the name and the network, or use a local "
            "file or data.source=gsm_symbolic"
        ) from None
    yield from ((f"row {index}", row) for index, row in enumerate(rows))
