"""What must not change when a run is resumed, as flat keys: settings, and what models and data are, however spelled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from opd_megatron.config import RunConfig
from opd_megatron.data.given_answers import GivenAnswers
from opd_megatron.data.prompts import PromptStream
from opd_megatron.data.tokenizer import tokenizer_fingerprint
from opd_megatron.errors import CheckpointError, ConfigError
from opd_megatron.models import ResolvedModels
from opd_megatron.weights.fingerprint import fingerprint

_ARCHITECTURE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
"""Keys of an HF config.json that tell one model from another; a folder's content may change under its name."""
# What a run may not change when it is resumed: another value would make the curves those of two different runs.
_IDENTITY = ("seed", "student", "teachers", "routes", "data", "objective", "rewards")
_PATH = re.compile(
    r"student\.(path|tokenizer)|teachers\.\d+\.path|data\.((eval_)?source|answers)|data\.sources\.\d+\.source"
)
"""Where something lies. It may move, and be spelled otherwise: what it is decides."""
_WHERE = re.compile(
    r"student\.(recompute(_layers)?|transformer_engine|(recompute_modules|offload_activations)(\.\d+)?)|(student|teachers\.\d+)\.offload(\.\d+)?"
    r"|rewards\.(time_limit|workers)"
    r"|teachers\.\d+\.(placement|tensor|pipeline|data|expert|in_flight|fingerprint|urls(\.\d+)?|api_key_env|request_timeout|retries|cache|missing)"
)
"""Where models run and what trades memory for time, and what follows from other keys: no result depends on it."""
_CHANGEABLE = {"teachers": ("teachers.", "routes"), "objective": ("objective.",)}
"""Entry of `checkpoint.allow_changed` -> beginnings of the keys that it lets change."""
_CONTENT = {
    "student.path": "student.weights", "student.tokenizer": "tokenizer", "data.source": "data.rows",
    "data.eval_source": "data.rows", "data.answers": "data.given",
}  # fmt: skip


def settings_identity(tree: dict[str, Any]) -> dict[str, Any]:
    """Flattens the settings that a run may not change, without paths: `objective.type`, `teachers.0.weight`, ..."""
    return {key: value for key, value in _flat(tree).items() if not _PATH.fullmatch(key)}


def run_identity(
    config: RunConfig,
    models: ResolvedModels,
    tokenizer: Any,
    prompts: PromptStream,
    teacher_tokenizers: Sequence[str] = (),
    *,
    given: GivenAnswers | None = None,
    scoring: bool = True,
) -> dict[str, Any]:
    """Collects what a run is: its settings, its models' shapes and weights, its tokenizer and its rows.

    Paths are in it too, under `paths`, for a note where they have changed. Without `scoring` teachers' weights are left
    out. `teacher_tokenizers` are their fingerprints. `given`: answers that are not sampled.
    """
    tree = config.model_dump(mode="json")
    identity = settings_identity(tree) | {
        f"model.{name}": getattr(models.student_config, name, None) for name in _ARCHITECTURE
    }
    identity["student.weights"] = fingerprint(models.student)
    if scoring:
        for index, (folder, _) in enumerate(models.teachers):
            identity[f"teachers.{index}.weights"] = fingerprint(folder)
        for index, found in enumerate(teacher_tokenizers):
            identity[f"teachers.{index}.tokenizer"] = found
    identity["tokenizer"] = tokenizer_fingerprint(tokenizer)
    identity["data.rows"] = prompts.dataset.fingerprint()
    if given is not None and given.saved is not None:
        identity["data.given"] = given.fingerprint()
    identity["paths"] = {key: value for key, value in _flat(tree).items() if _PATH.fullmatch(key)}
    return identity


def teacher_fingerprints(config: RunConfig, models: ResolvedModels, identity: Mapping[str, Any]) -> list[str]:
    """Hashes what each teacher is: its architecture, weights and tokenizer.

    Raises:
        ConfigError: a teacher is another than its `fingerprint` says.
    """
    found = []
    for number, (teacher, (_, hf_config)) in enumerate(zip(config.teachers, models.teachers, strict=True)):
        shape = [(name, getattr(hf_config, name, None)) for name in _ARCHITECTURE]
        content = [shape, *(identity.get(f"teachers.{number}.{part}") for part in ("weights", "tokenizer"))]
        found.append(sha256(repr(content).encode()).hexdigest()[:16])
        if teacher.fingerprint not in (None, found[-1]) and "teachers" not in config.checkpoint.allow_changed:
            raise ConfigError(
                f"teacher {teacher.path!r} is another than teachers.{number}.fingerprint={teacher.fingerprint} says "
                f"(it is {found[-1]}): give the same model, or leave the fingerprint out; a run that is resumed takes "
                "another with checkpoint.allow_changed=[teachers]"
            )
    return found


def with_fingerprints(config: RunConfig, fingerprints: Sequence[str]) -> RunConfig:
    """Fills in what each teacher is."""
    config = config.model_copy(deep=True)
    for teacher, found in zip(config.teachers, fingerprints, strict=True):
        teacher.fingerprint = found
    return config


def unchanged_part(identity: dict[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
    """Leaves of an identity what a run may not change, `checkpoint.allow_changed` considered."""
    free = tuple(beginning for name in allowed for beginning in _CHANGEABLE[name])
    return {key: value for key, value in identity.items() if not (free and key.startswith(free))}


def student_only(identity: dict[str, Any]) -> dict[str, Any]:
    """Leaves of an identity what concerns the student: other data or teachers do not hinder a look at its weights."""
    return {key: value for key, value in identity.items() if key.startswith(("student.", "model.", "tokenizer"))} | {
        "paths": {key: value for key, value in identity.get("paths", {}).items() if key.startswith("student.")}
    }


def first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Finds the first key on which two identities disagree, with both values."""
    for key, value in ours.items():
        if key != "paths" and theirs.get(key, value) != value:  # a key the older one lacks had its default then
            return key, theirs[key], value
    return None


def check_identity(theirs: dict[str, Any], ours: dict[str, Any], what: str) -> list[str]:
    """Raises CheckpointError when `what` (a checkpoint, a run directory), saved with `theirs`, is another run's or
    another model's. Returns notes on what lies elsewhere than it did."""
    difference = first_difference(theirs, ours)
    if difference is not None:
        key, their_value, our_value = difference
        was, now = _names_of(key, theirs), _names_of(key, ours)
        if was or now:
            raise CheckpointError(
                f"{what} belongs to a run with other {_word_of(key)} ({key}: {was}, here {now}): "
                f"give the same ones to resume, or choose another output_dir{allowance(key)}"
            )
        raise CheckpointError(
            f"{what} belongs to a run with {key}={their_value!r}, this one has {our_value!r}: "
            f"choose another output_dir, or the same settings to resume{allowance(key)}"
        )
    return _moved(_old_paths(theirs), ours["paths"], theirs)


_WORDS = {"tokenizer": "tokenizer", "data.rows": "rows of data", "data.given": "answers"}


def _word_of(key: str) -> str:
    return _WORDS.get(key, key.rpartition(".")[2])


def allowance(key: str) -> str:
    """Says how a key may change all the same, where it may."""
    for name, beginnings in _CHANGEABLE.items():
        if key.startswith(beginnings):
            return f", or let it change with checkpoint.allow_changed=[{name}]"
    return ""


def _names_of(key: str, identity: dict[str, Any]) -> str:
    """Names where something of an identity that is a hash lies; empty for a plain setting."""
    if not key.endswith((".weights", ".tokenizer")) and key not in _WORDS:
        return ""
    paths = _old_paths(identity)
    sources = [path for path, content in _CONTENT.items() if content == key] or [f"{key.rpartition('.')[0]}.path"]
    return ", ".join(str(paths[path]) for path in sources if paths.get(path)) or "the student's"


def _moved(before: dict[str, Any], now: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    notes = []
    for key, value in now.items():
        was = before.get(key, value)
        if was == value or (was and value and os.path.realpath(str(was)) == os.path.realpath(str(value))):
            continue
        content = _CONTENT.get(key, key.replace(".path", ".weights"))
        sure = "the same by content" if content in theirs else "an older checkpoint: not compared by content"
        notes.append(f"{key} was {was!r} and is {value!r} now ({sure})")
    return notes


def _old_paths(identity: dict[str, Any]) -> dict[str, Any]:
    """Reads paths also where releases before `paths` had them, among the settings."""
    paths = identity.get("paths")
    return paths if isinstance(paths, dict) else {key: v for key, v in identity.items() if _PATH.fullmatch(key)}


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    flat = _flatten({key: tree.get(key) for key in _IDENTITY})
    return {key: value for key, value in flat if not _WHERE.fullmatch(key)}


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    # Any keys: they are a whole, or one that only the older run had would be missed.
    if prefix in ("data.template_kwargs", "routes", "rewards.tasks"):
        return [(prefix, tree)]
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = {str(index): value for index, value in enumerate(tree)}.items()
    else:
        return [(prefix, tree)]
    return [leaf for key, value in items for leaf in _flatten(value, f"{prefix}.{key}" if prefix else str(key))]
