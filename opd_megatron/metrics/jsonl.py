"""`metrics.jsonl`, and copies of it for TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import types
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opd_megatron.errors import ConfigError, MissingPathError, one_line
from opd_megatron.system.atomic import write_file
from opd_megatron.system.reading import read_text
from opd_megatron.types import StepMetrics

MetricsRow = dict[str, Any]
PHASES = ("rollout", "teacher", "train", "sync")
"""The timed phases of a step, in order: `time/<phase>`."""
FILE_NAME = "metrics.jsonl"


class NullLog:
    """Writes nothing: what every rank but the first holds."""

    def write(self, metrics: StepMetrics | Mapping[str, Any]) -> None:
        """Records a step, or a plain mapping with `step` (the evaluation before training has nothing else)."""

    def close(self) -> None:
        """Closes every writer. Safe to call twice."""

    def __enter__(self) -> NullLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class MetricsLog(NullLog):
    """Appends one JSON object a line to `<run_dir>/metrics.jsonl`, flushed, so that a killed run keeps its history.

    `resume_step=N` continues after step N: rows of later steps, which will be repeated, are dropped first.
    `resume_step=None` starts a new file. NaN and infinities are written as null.

    It only watches: a writer that fails later is noted once (`on_problem`) and left out; rows of metrics.jsonl that
    could not be written are written with the next one.

    Raises:
        ConfigError: a W&B project or TensorBoard is asked for and its package is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        config_dict: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        on_problem: Callable[[str], None] = lambda _: None,
    ) -> None:
        run_dir = Path(run_dir)
        self._on_problem, self._unwritten = on_problem, ""
        self._noted: set[str] = set()
        run_dir.mkdir(parents=True, exist_ok=True)
        # Optional writers come first: a missing package must not cost the history of an earlier run.
        self._wandb: Any = None
        self._tensorboard: Any = None
        if wandb_project:
            self._wandb = self._started("W&B", lambda: _start_wandb(run_dir, wandb_project, config_dict))
        if tensorboard:
            self._tensorboard = self._started("TensorBoard", lambda: _start_tensorboard(run_dir, resume_step))
        path = run_dir / FILE_NAME
        kept = [] if resume_step is None or not path.exists() else read_metrics(run_dir)
        _rewrite(path, [row for row in kept if row["step"] <= (resume_step or 0)])
        self._path = path

    def write(self, metrics: StepMetrics | Mapping[str, Any]) -> None:
        row = _clean(metrics.as_dict() if isinstance(metrics, StepMetrics) else metrics)
        self._append(_line(row))
        numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
        if self._tensorboard is not None and not self._works("TensorBoard", lambda: self._draw(numbers, row["step"])):
            self._tensorboard = None
        wandb = self._wandb
        if wandb is not None and not self._works("W&B", lambda: wandb.log(numbers, step=row["step"])):
            self._wandb = None

    def close(self) -> None:
        if self._unwritten:
            self._append("")
        if self._tensorboard is not None:
            self._works("TensorBoard", self._tensorboard.close)
            self._tensorboard = None
        if self._wandb is not None:
            self._works("W&B", self._wandb.finish)
            self._wandb = None

    def _append(self, line: str) -> None:
        self._unwritten += line
        if self._works(FILE_NAME, self._write_rows):
            self._unwritten = ""

    def _write_rows(self) -> None:
        """Appends the rows that are due, all of them or none."""
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(self._unwritten)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            raise

    def _draw(self, numbers: Mapping[str, Any], step: int) -> None:
        assert self._tensorboard is not None
        for key, value in numbers.items():
            self._tensorboard.add_scalar(key, value, step)
        self._tensorboard.flush()

    def _started(self, name: str, start: Callable[[], Any]) -> Any:
        try:
            return start()
        except ConfigError:
            raise
        except Exception as error:
            self._on_problem(f"warning: {name} cannot be started, the run goes on without ({one_line(error)})")
            return None

    def _works(self, name: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except Exception as error:  # of libraries that write where they like
            if name not in self._noted:
                self._noted.add(name)
                self._on_problem(f"warning: {name} could not be written, the run goes on ({one_line(error)})")
            return False
        return True


def read_metrics(run_dir: str | Path) -> list[MetricsRow]:
    """Reads the rows of `<run_dir>/metrics.jsonl` in order; a last line cut off by a killed run is left out.

    Raises MissingPathError when there is no such file.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise MissingPathError(f"{str(path)!r} does not exist: give the directory of a run that has made a step")
    rows: list[MetricsRow] = []
    lines = read_text(path, ConfigError, "correct or remove the file").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise ConfigError(f"{str(path)!r} line {number} is not a row of metrics: correct or remove the line")
    return rows


def _clean(row: Mapping[str, Any]) -> MetricsRow:
    assert "step" in row, "a row of metrics needs its step"
    values = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def _line(row: MetricsRow) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _rewrite(path: Path, rows: list[MetricsRow]) -> None:
    """Replaces the file in one move: a crash leaves the old one or the new one."""
    write_file(path, "".join(_line(row) for row in rows))


def _start_tensorboard(run_dir: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "logging.tensorboard=true needs the tensorboard package: pip install tensorboard, or switch it off"
        ) from None
    # The steps after the resumed one are in older event files already; purge_step hides them.
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=(0 if resume_step is None else resume_step + 1))


def _start_wandb(run_dir: Path, project: str, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError:
        wandb = types.ModuleType("wandb")
    if not hasattr(wandb, "init"):  # a folder that wandb once wrote is importable too
        raise ConfigError(
            f"logging.wandb_project={project!r} needs the wandb package: pip install wandb, or leave it null"
        )
    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12])
    return wandb.init(
        project=project, id=id_file.read_text(), resume="allow", dir=str(run_dir), config=dict(config or {})
    )
