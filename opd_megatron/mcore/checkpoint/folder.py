"""The folder of checkpoints: what lies in it, and the order in which things appear and disappear there.

    step_00000050/           complete by construction: it was renamed to this name after its last byte was on disk
    .step_00000100.partial/  being written, or left by a run that was killed; never read
    .step_00000010.deleted/  on its way out
    latest, best             text files with the name of a checkpoint, replaced in one move

All functions but the two readers are for rank 0 alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

STATE_FILE = "run.json"
LATEST, BEST = "latest", "best"
_NAME = re.compile(r"step_(\d{8})")
_LEFTOVER = re.compile(r"\.step_\d{8}\.(partial|deleted)")


@dataclass(frozen=True, slots=True)
class BestCheckpoint:
    """Which checkpoint is never pruned: the one whose `metric` (a key of metrics.jsonl) is lowest or highest."""

    metric: str
    mode: Literal["min", "max"] = "min"

    def choose(self, found: list[tuple[int, Path]]) -> Path | None:
        """The best of these checkpoints, the earliest of equals; None when none was measured."""
        measured = [(value, step, path) for step, path in found if (value := self._value(path)) is not None]
        if not measured:
            return None
        sign = 1 if self.mode == "min" else -1
        return min(measured, key=lambda item: (sign * item[0], item[1]))[2]

    def _value(self, path: Path) -> float | None:
        try:
            value = read_state(path).get("metrics", {}).get(self.metric)
        except (OSError, ValueError):  # damaged: not a candidate, and loading it will say why
            return None
        return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints as (step, path), oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises OSError or ValueError when it is damaged."""
    state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError(f"{STATE_FILE} holds no mapping")
    return state


def make_partial(final: Path) -> Path:
    """An empty folder to write into; what killed runs left behind goes first."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for path in final.parent.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    partial = partial_path(final)
    partial.mkdir()
    return partial


def partial_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def publish(partial: Path, final: Path) -> None:
    """Gives a complete checkpoint its name; its files are on disk already."""
    sync(partial)
    if final.exists():  # a damaged one of the same step
        remove(final)
    os.rename(partial, final)
    sync(final.parent)


def prune(folder: Path, newest: int, keep: int, best: BestCheckpoint | None) -> None:
    """Renews `latest` and `best`, then removes all but those and the last `keep` up to step `newest`.

    Later ones were found damaged when the run was resumed from an earlier one: they go too.
    """
    every = list_checkpoints(folder)
    found = [item for item in every if item[0] <= newest]
    chosen = best.choose(found) if best else None
    _point(folder / LATEST, found[-1][1].name)
    if chosen is not None:
        _point(folder / BEST, chosen.name)
    kept = {path for _, path in found[-keep:]} | {chosen}
    for _, path in every:
        if path not in kept:
            remove(path)


def remove(path: Path) -> None:
    """Takes the name away before the content: a killed removal leaves no half checkpoint with a real name."""
    going = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(going, ignore_errors=True)
    os.rename(path, going)
    shutil.rmtree(going, ignore_errors=True)


def sync(path: Path) -> None:
    """Flushes a file or a folder's list of names: a power cut must not leave a name without content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_name(f".{pointer.name}.new")
    temporary.write_text(f"{name}\n", encoding="utf-8")
    sync(temporary)
    temporary.replace(pointer)
