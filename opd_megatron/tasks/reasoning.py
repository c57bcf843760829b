"""Tasks of reasoning-gym (arXiv 2505.24760), `reasoning_gym:NAME`: questions without end, each judged by own rules."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from opd_megatron.tasks.base import Row, Task, TaskData

PREFIX = "reasoning_gym:"
_STRIDE = 1_000_003
"""Between the questions of two seeds: question i of a seed is drawn from seed + i."""


def named(task: str) -> Task:
    """Finds the task of `reasoning_gym:NAME`. Raises ValueError where there is none."""
    name = task.removeprefix(PREFIX)
    known = library().factory.DATASETS
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else "see reasoning-gym's gallery"
        raise ValueError(f"reasoning-gym has no task {name!r}: {hint}")
    return Task(
        functools.partial(_verify, name), extract=final, columns=("metadata",),
        instruction="Give the final answer between <answer> and </answer>.",
        data=TaskData(task, prompt_column="question"),
    )  # fmt: skip


def questions(source: str, seed: int, count: int, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Makes up to `count` questions of `reasoning_gym:NAME`, no two alike. The same seed gives the same ones.

    Raises ValueError for arguments that the task does not take.
    """
    name = source.removeprefix(PREFIX)
    found = _dataset(name, seed * _STRIDE, max(count, 1), _frozen(arguments))
    seen: set[str] = set()
    for index in range(count):
        entry = found[index]
        if entry["question"] not in seen:
            seen.add(entry["question"])
            # Metadata may hold anything; from these the entry is made again.
            where = {"seed": seed * _STRIDE, "index": index, "size": max(count, 1), "arguments": dict(arguments)}
            yield {"question": entry["question"], "answer": str(entry["answer"]), "metadata": where}


def final(text: str) -> str | None:
    """What stands between the last <answer> and </answer>; the whole text without them."""
    start = text.rfind("<answer>")
    if start >= 0:
        return text[start + len("<answer>") :].partition("</answer>")[0].strip()
    return text.strip() or None


def _verify(name: str, answer: str, row: Row) -> float:
    found, metadata = final(answer), row["metadata"]
    if found is None:
        return 0.0
    if isinstance(metadata, Mapping) and set(metadata) == {"seed", "index", "size", "arguments"}:
        data = _dataset(name, metadata["seed"], metadata["size"], _frozen(metadata["arguments"]))
        entry = data[metadata["index"]]
    else:
        data = _dataset(name, 0, 1, ())
        entry = {"question": row.get("prompt"), "answer": row["answer"], "metadata": metadata}
    return min(1.0, max(0.0, float(data.score_answer(found, entry))))


@functools.lru_cache(maxsize=8)
def _dataset(name: str, seed: int, size: int, arguments: tuple[tuple[str, Any], ...]) -> Any:
    try:
        return library().create_dataset(name, seed=seed, size=size, **dict(arguments))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym's {name} does not take {dict(arguments)} ({error})") from None


def _frozen(arguments: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in arguments.items()))


@functools.cache
def library() -> Any:
    """Imports reasoning-gym, which is slow: who has no use for it does without. Raises ValueError without it."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore", SyntaxWarning)  # of a package that it imports
        if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
            # A SAT solver of other puzzles, left out of the environment because it needs a C compiler.
            sys.modules["pycosat"] = types.ModuleType("pycosat")
        import reasoning_gym
        import reasoning_gym.factory

        return reasoning_gym
    raise ValueError("reasoning-gym is not installed: run `make env`")
