"""The folder of checkpoints: what lies in it, and the order in which things appear and disappear there.

    step_00000050/    a complete checkpoint (`system.atomic` has the names of incomplete ones)
    latest, best      text files with the name of a checkpoint, replaced in one move

All functions but the two readers are for rank 0 alone.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opd_megatron.system.atomic import partial_path, remove, write_file

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
        """Chooses the best of these checkpoints, the earliest of equals; None when none was measured."""
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
    """Lists complete checkpoints as (step, path), oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def read_state(path: Path) -> dict[str, Any]:
    """Reads the JSON state of a checkpoint. Raises OSError or ValueError when it is damaged."""
    state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError(f"{STATE_FILE} holds no mapping")
    return state


def make_partial(final: Path) -> Path:
    """Makes an empty folder to write into, and removes what killed runs left behind."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for path in final.parent.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    partial = partial_path(final)
    partial.mkdir()
    return partial


def prune(folder: Path, newest: int, keep: int, best: BestCheckpoint | None) -> None:
    """Renews `latest` and `best`, then removes all but those and the last `keep` up to step `newest`.

    Later ones were found damaged when the run was resumed from an earlier one: they go too.
    """
    every = list_checkpoints(folder)
    found = [item for item in every if item[0] <= newest]
    chosen = best.choose(found) if best else None
    write_file(folder / LATEST, f"{found[-1][1].name}\n")
    if chosen is not None:
        write_file(folder / BEST, f"{chosen.name}\n")
    kept = {path for _, path in found[-keep:]} | {chosen}
    for _, path in every:
        if path not in kept:
            remove(path)
