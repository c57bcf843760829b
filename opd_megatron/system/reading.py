"""The one way in for files that people and other programs wrote: text, JSON and YAML, with errors of one line.

A byte-order mark is skipped, `~` is the home folder, a `.gz` file is unpacked, and whatever is wrong is an OPDError
that names the file, what is wrong with it and what to do. Content is given back as it is; what it must hold is the
caller's to check.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

from opd_megatron.errors import MissingPathError, OPDError, one_line
from opd_megatron.system.atomic import disk_remedy


def user_path(path: str | Path) -> Path:
    """Expands `~` in a path that a person wrote."""
    return Path(os.path.expanduser(path))


def read_text(path: str | Path, kind: type[OPDError], remedy: str = "correct or replace the file") -> str:
    """Reads a UTF-8 file.

    Args:
        kind: class of the error when there is something wrong with the file.
        remedy: what to do then.

    Raises:
        MissingPathError: there is no such file.
    """
    path = user_path(path)
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise MissingPathError(f"{str(path)!r} does not exist: {remedy}") from None
    except IsADirectoryError:
        raise kind(f"{str(path)!r} is a folder and must be a file: {remedy}") from None
    except UnicodeDecodeError as error:
        raise kind(f"{str(path)!r} is not UTF-8 text (byte {error.start}): {remedy}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise kind(f"{str(path)!r} cannot be read ({one_line(error)}): {disk_remedy(error) or remedy}") from None


def parse_json(text: str, where: str, kind: type[OPDError], remedy: str = "correct it there") -> Any:
    """Parses JSON; `where` names the file, and the line where the text is one of several."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise kind(f"{where!r} is not valid JSON ({error.msg} at {place}): {remedy}") from None
    except RecursionError:
        raise kind(f"{where!r} is nested too deeply to be read: {remedy}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise kind(f"{where!r} is not valid JSON ({one_line(error)}): {remedy}") from None


def read_json_object(
    path: str | Path, kind: type[OPDError], remedy: str = "correct or replace the file"
) -> dict[str, Any]:
    """Reads a file that holds one JSON object."""
    content = parse_json(read_text(path, kind, remedy), str(path), kind, remedy)
    if not isinstance(content, dict):
        raise kind(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}: {remedy}")
    return content


def parse_yaml(text: str, where: str, kind: type[OPDError], remedy: str = "correct it there") -> Any:
    """Parses YAML of plain values."""
    import yaml  # not needed by everyone who reads files

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise kind(f"{where} is not valid YAML ({' '.join(str(error).split())[:200]}): {remedy}") from None
    except (RecursionError, ValueError, TypeError) as error:  # an impossible date, a mapping as a key
        raise kind(f"{where} is not valid YAML ({one_line(error)}): {remedy}") from None


def read_yaml_mapping(
    path: str | Path, kind: type[OPDError], remedy: str = "correct or replace the file"
) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping; an empty file is an empty one."""
    content = parse_yaml(read_text(path, kind, remedy), repr(str(path)), kind, remedy)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise kind(f"{str(path)!r} must hold a mapping of sections, got {type(content).__name__}: {remedy}")
    return content


def is_text(value: Any) -> bool:
    """Tells whether a value is a string that UTF-8 can write; a lone surrogate cannot be tokenized or shown."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
