"""Files of rows: JSON lines, JSON, CSV, TSV and Parquet, in upper or lower case, the text ones also as `.gz`."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opd_megatron.errors import DataError, MissingPathError, one_line
from opd_megatron.system.reading import parse_json, read_text, user_path

Record = tuple[str, dict[str, Any]]
"""Where it stands (`line 3`, `row 3`), and its columns."""


def is_file(source: str) -> bool:
    """Tells a file of rows from a hub id, a folder and the name of made data, also where the file does not exist."""
    path = user_path(source)
    return suffix_of(source) in READERS or path.is_file() or (not path.is_dir() and _looks_like_a_path(source))


def suffix_of(source: str) -> str:
    """Returns the suffix that tells the format, in lower case and without `.gz`."""
    path = Path(source.lower())
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def name_of(source: str) -> str:
    """Returns the file's name without its suffixes: the first part of its rows' ids."""
    name = Path(source).name
    for suffix in (".gz", suffix_of(source)):
        if suffix and name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def read_records(source: str) -> Iterator[Record]:
    """Reads the rows of a file.

    Raises:
        MissingPathError: there is no such file.
        DataError: the format is unknown, or the file damaged; names the line.
    """
    path, suffix = user_path(source), suffix_of(source)
    if not path.exists():
        raise MissingPathError(
            f"data file {str(path)!r} does not exist: give a .jsonl file, a folder, a hub id or gsm_symbolic"
        )
    if suffix not in READERS:
        raise DataError(
            f"data file {str(path)!r} has the suffix {path.suffix!r}, which is not read: give one of "
            f"{', '.join(READERS)}, or .gz of a text one"
        )
    yield from READERS[suffix](path)


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _json_lines(path: Path) -> Iterator[Record]:
    text = _text(path)
    if text.lstrip().startswith("["):
        yield from _json_list(parse_json(text, str(path), DataError), path)
        return
    # Not splitlines(): JSON texts may hold U+2028 and other line ends that are not its own.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number}"
            row = parse_json(line, f"{path} {where}", DataError, "correct it there, one object a line")
            yield where, _mapping(row, path, where)


def _json(path: Path) -> Iterator[Record]:
    text = _text(path)
    try:
        content = parse_json(text, str(path), DataError)
    except DataError:
        first = text.lstrip().split("\n", 1)[0].strip()
        if not (first.startswith("{") and first.endswith("}")):
            raise
        yield from _json_lines(path)  # JSON lines under the other suffix
        return
    if isinstance(content, list):
        yield from _json_list(content, path)
        return
    lists = {} if not isinstance(content, dict) else {
        key: value for key, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    }  # fmt: skip
    if len(lists) == 1:
        yield from _json_list(next(iter(lists.values())), path)
    elif isinstance(content, dict) and not lists:
        yield "line 1", content  # one row
    else:
        raise DataError(
            f"{str(path)!r} must hold a list of objects, or an object with one such list, has "
            f"{', '.join(map(repr, lists)) or type(content).__name__}: write the rows into a file of their own"
        )


def _json_list(rows: list[Any], path: Path) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield f"item {number}", _mapping(row, path, f"item {number}")


def _mapping(row: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{str(path)!r} {where} must be a JSON object, got {type(row).__name__}: "
            'write it as {"question": ..., "answer": ...}'
        )
    return row


def _separated(delimiter: str) -> Callable[[Path], Iterator[Record]]:
    def read(path: Path) -> Iterator[Record]:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
        try:
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row:
                    raise DataError(
                        f"{str(path)!r} {where} has more cells than the first line has names: quote cells that hold "
                        f"{delimiter!r}"
                    )
                yield where, {name: cell or None for name, cell in row.items()}
        except csv.Error as error:
            raise DataError(f"{str(path)!r} line {reader.line_num} is not valid CSV ({error}): correct it") from None

    return read


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet  # slow to import, and only this format needs it
    except ImportError:
        raise DataError(f"{str(path)!r} needs the pyarrow package: pip install pyarrow") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} is no whole Parquet file ({one_line(error)}): write it again") from None


def _text(path: Path) -> str:
    return read_text(path, DataError, "convert it to UTF-8, or write it again")


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _separated(","), ".tsv": _separated("\t"),
    ".parquet": _parquet,
}  # fmt: skip
