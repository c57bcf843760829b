"""YAML and `a.b=value` overrides to a checked configuration and back; pydantic's errors as one line."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from opd_megatron.config.run import RunConfig
from opd_megatron.config.run_folder import named_run
from opd_megatron.errors import ConfigError
from opd_megatron.system.reading import read_yaml_mapping

RENAMED = {"rollout.start_timeout": "rollout.request_timeout"}
"""Keys of earlier releases, and what they are called now."""


def load_config(
    path: str | Path | None, overrides: list[str] | tuple[str, ...] = (), defaults: Mapping[str, Any] | None = None
) -> RunConfig:
    """Reads a YAML file, applies `a.b=value` overrides (values are YAML) and checks every rule.

    List elements are addressed by index (`teachers.0.path=...`). `path=None` starts from the defaults. A run directory
    stands for the configuration inside it, with itself as `output_dir`. `defaults`: values of keys (`a.b`) that neither
    has.

    Raises:
        MissingPathError: the file does not exist.
        ConfigError: the YAML is malformed, a key is unknown, or a value breaks a rule.
    """
    tree = _read(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(tree, override)
    for key, value in (defaults or {}).items():
        if not _has(tree, key):
            set_by_path(tree, key, value)
    return build_config(tree)


def build_config(tree: dict[str, Any]) -> RunConfig:
    """Validates a nested dictionary; the first problem is raised as a one-line ConfigError."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from None


def dump_config(config: RunConfig) -> str:
    """Writes the resolved configuration as YAML, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _has(tree: dict[str, Any], key: str) -> bool:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return named_run(path)
    return read_yaml_mapping(path, ConfigError, "give the path of a YAML file of sections, or a run directory")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise ConfigError(f"override {override!r} must have the form key.path=value, e.g. optimizer.lr=1e-4")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML, quote it") from None
    set_by_path(tree, key, value)


def set_by_path(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets `a.b.0.c` in nested dictionaries and lists, making what is missing."""
    node: Any = tree
    parts = key.split(".")
    for part, following in itertools.pairwise(parts):
        node = _descend(node, part, key, [] if following.isdigit() else {})
    last = parts[-1]
    if isinstance(node, list):
        _grow(node, last, key, value)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override key {key!r} goes through a plain value: {last!r} has no parent section")


def _descend(node: Any, part: str, key: str, default: Any) -> Any:
    if isinstance(node, list):
        _grow(node, part, key, default)
        return node[int(part)]
    if not isinstance(node, dict):
        raise ConfigError(f"override key {key!r} goes through a plain value at {part!r}")
    if node.get(part) is None:
        node[part] = default
    return node[part]


def _grow(node: list[Any], part: str, key: str, default: Any) -> None:
    if not part.isdigit() or int(part) > len(node):
        raise ConfigError(f"override key {key!r}: {part!r} must be an index from 0 to {len(node)}")
    if int(part) == len(node):
        node.append(default)


def first_problem(error: ValidationError, root: type[BaseModel] = RunConfig) -> str:
    """Describes the first problem of a validation in one line, with the key as the user writes it."""
    # An unknown key is the likelier typo behind a "field required" next to it.
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    path, model = _section_at(first["loc"][:-1], root)
    location = ".".join(str(part) for part in (*path, *first["loc"][-1:]))
    if first["type"] == "extra_forbidden":
        if location in RENAMED:
            return f"config key {location!r} is called {RENAMED[location]!r} now: rename it"
        known = list(model.model_fields)
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown config key {location!r}: {hint}"
    context = first.get("ctx", {})
    if first["type"] == "union_tag_invalid":
        choices = " or ".join(tag.strip() for tag in context["expected_tags"].replace("'", "").split(","))
        return f"{location}.placement={context['tag']!r} is not one: use {choices}"
    cause = context.get("error")
    if cause is not None:  # a rule of ours, which names what it concerns
        return str(cause)
    return f"{location}={first['input']!r}: {first['msg']}" if location else first["msg"]


def _section_at(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[list[int | str], type[BaseModel]]:
    """Finds the section at pydantic's `location` and the keys that lead there, without the tags of unions."""
    path: list[int | str] = []
    sections: list[type[BaseModel]] = [root]
    for part in location:
        field = None if isinstance(part, int) else sections[0].model_fields.get(part)
        if field is not None:
            sections = sections_of(field.annotation) or sections
        elif not isinstance(part, int):
            sections = [kind for kind in sections if _tag_of(kind) == part] or sections
            continue
        path.append(part)
    return path, sections[0]


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Lists the section classes in an annotation: itself, a list's elements, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections_of(part)]


def _tag_of(section: type[BaseModel]) -> Any:
    placement = section.model_fields.get("placement")
    return None if placement is None else placement.default
