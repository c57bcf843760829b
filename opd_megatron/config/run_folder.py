"""A run directory as a configuration: what the run was started with, wherever it lies and is named from now.

config.yaml holds paths as the user wrote them, relative to the folder in which the run was started; run.json remembers
that folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_megatron.config.teachers import STUDENT
from opd_megatron.errors import ConfigError
from opd_megatron.system.atomic import write_file
from opd_megatron.system.reading import read_json_object, read_yaml_mapping

CONFIG_FILE = "config.yaml"
RECORD_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """run.json: where a run was started, and from what."""

    working_directory: str
    run_directory: str
    """Both absolute, when the run was last started."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What the run must stay (`run.identity`)."""

    def write(self, folder: Path) -> None:
        tree = {
            "working_directory": self.working_directory, "run_directory": self.run_directory, "identity": self.identity,
        }  # fmt: skip
        write_file(folder / RECORD_FILE, json.dumps(tree, indent=2) + "\n")

    @staticmethod
    def read(folder: Path) -> RunRecord | None:
        """Reads the record of the run in `folder`; None for a run of a release that wrote none."""
        path = folder / RECORD_FILE
        if not path.exists():
            return None
        tree = read_json_object(path, ConfigError, "remove the file, the run goes on without")
        identity = tree.get("identity")
        return RunRecord(
            str(tree.get("working_directory", "")),
            str(tree.get("run_directory", "")),
            identity if isinstance(identity, dict) else {},
        )


def is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the resolved configuration of the run in `folder`.

    Raises:
        ConfigError: the file is damaged, or empty.
    """
    remedy = "restore the file from a copy, or name the run's own YAML file and another output_dir"
    tree = read_yaml_mapping(folder / CONFIG_FILE, ConfigError, remedy)
    if not tree:
        raise ConfigError(f"{str(folder / CONFIG_FILE)!r} is empty: {remedy}")
    return tree


def named_run(folder: Path) -> dict[str, Any]:
    """Reads the configuration of the run in `folder` for a command that names that folder: it is the `output_dir`, and
    relative paths lead where they led when the run was started.

    Raises:
        ConfigError: the folder holds no run, or its files are damaged.
    """
    if not is_run(folder):
        raise ConfigError(
            f"{str(folder)!r} is a folder without {CONFIG_FILE}: give a YAML file or the output_dir of a run"
        )
    tree, record = read_settings(folder), RunRecord.read(folder)
    tree["output_dir"] = str(folder)
    if record is not None:
        for section, key in _paths(tree):
            section[key] = anchored(section[key], folder, record)
    return tree


def anchored(path: str, folder: Path, record: RunRecord) -> str:
    """Finds what a relative `path` of the run in `folder` meant: from where the run was started or, when that has moved
    together with the run, as far from the run as then. A hub id, and a path that is nowhere, stay as they are."""
    if os.path.isabs(os.path.expanduser(path)):
        return path
    original = os.path.normpath(os.path.join(record.working_directory, path))
    beside = os.path.normpath(os.path.join(folder.resolve(), os.path.relpath(original, record.run_directory or "/")))
    if os.path.exists(path) and os.path.realpath(path) in map(os.path.realpath, (original, beside)):
        return path
    return next((place for place in (original, beside) if os.path.exists(place)), path)


def _paths(tree: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Lists the entries of a configuration that may be paths, as (section, key)."""
    teachers, data = tree.get("teachers"), tree.get("data")
    teachers = [each for each in (teachers if isinstance(teachers, list) else []) if isinstance(each, dict)]
    others = [teacher for teacher in teachers if teacher.get("path") != STUDENT]
    sources = data.get("sources") if isinstance(data, dict) else None
    places = [
        (tree.get("student"), "path"), (tree.get("student"), "tokenizer"), (data, "source"), (data, "eval_source"),
        (data, "answers"),
        *((teacher, "path") for teacher in others),
        *((teacher, "cache") for teacher in teachers),
        *((source, "source") for source in (sources if isinstance(sources, list) else [])),
    ]  # fmt: skip
    return [
        (section, key) for section, key in places if isinstance(section, dict) and isinstance(section.get(key), str)
    ]
