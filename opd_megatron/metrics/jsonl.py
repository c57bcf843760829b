"""`metrics.jsonl`, and copies of it for TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import types
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_megatron.errors import ConfigError, MissingPathError
from opd_megatron.system.atomic import write_file
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
    ) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        # Optional writers come first: a missing package must not cost the history of an earlier run.
        self._wandb = _start_wandb(run_dir, wandb_project, config_dict) if wandb_project else None
        self._tensorboard = _start_tensorboard(run_dir, resume_step) if tensorboard else None
        path = run_dir / FILE_NAME
        kept = [] if resume_step is None or not path.exists() else read_metrics(run_dir)
        _rewrite(path, [row for row in kept if row["step"] <= (resume_step or 0)])
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics | Mapping[str, Any]) -> None:
        row = _clean(metrics.as_dict() if isinstance(metrics, StepMetrics) else metrics)
        self._file.write(_line(row))
        self._file.flush()
        numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, row["step"])
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def read_metrics(run_dir: str | Path) -> list[MetricsRow]:
    """Reads the rows of `<run_dir>/metrics.jsonl` in order; a last line cut off by a killed run is left out.

    Raises MissingPathError when there is no such file.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise MissingPathError(f"{str(path)!r} does not exist: give the directory of a run that has made a step")
    rows: list[MetricsRow] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ConfigError(f"{str(path)!r} line {number} is not JSON: correct or remove the line") from None
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
