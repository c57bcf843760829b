"""The run directory: what lies in it, and whether it belongs to this run.

config.yaml   run.json   run.lock   metrics.jsonl   rollout-N.log   rollouts/   profile/   tensorboard/   checkpoints/
hf/   report/
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.config import RunConfig, dump_config
from opd_megatron.config.run_folder import CONFIG_FILE, RunRecord, is_run, read_settings
from opd_megatron.data.saved_rollouts import FOLDER
from opd_megatron.errors import ConfigError, one_line
from opd_megatron.run.identity import (
    allowance,
    check_identity,
    first_difference,
    settings_identity,
    student_only,
    unchanged_part,
)
from opd_megatron.run.lock import LOCK_FILE
from opd_megatron.system.atomic import disk_remedy, write_file


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / CONFIG_FILE

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def hf_dir(self) -> Path:
        return self.root / "hf"

    @property
    def rollouts(self) -> Path:
        """What was sampled, where that is saved."""
        return self.root / FOLDER

    def rollout_log(self, engine: int) -> Path:
        """What the process of an engine of the fleet prints."""
        return self.root / f"rollout-{engine}.log"

    def check(self, config: RunConfig, *, training: bool = True) -> None:
        """Raises ConfigError when the folder holds another run, or something that is not a run.

        Where no `training` is meant, only the student's own settings must agree.
        """
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise ConfigError(f"output_dir={str(self.root)!r} must be a folder, it is a file: choose another name")
        saved = self.settings()
        if not saved:
            if any(not path.name.startswith(".") and path.name != LOCK_FILE for path in self._inside()):
                raise ConfigError(
                    f"output_dir={str(self.root)!r} is not empty and holds no run's {CONFIG_FILE}: choose another "
                    "folder"
                )
            return
        theirs, ours = settings_identity(saved), settings_identity(config.model_dump(mode="json"))
        if training:
            ours = unchanged_part(ours, config.checkpoint.allow_changed)
        else:
            theirs, ours = student_only(theirs), student_only(ours)
        difference = first_difference(theirs, ours)
        if difference is not None:
            key, their_value, our_value = difference
            raise ConfigError(
                f"output_dir={str(self.root)!r} belongs to a run with {key}={their_value!r}, this one has "
                f"{our_value!r}: choose another output_dir, or the same settings to resume{allowance(key)}"
            )

    def check_content(self, identity: dict[str, Any], allowed: Sequence[str] = ()) -> list[str]:
        """Raises CheckpointError when the run that lies here had other models or data (`run.identity`), whatever their
        paths; returns notes on paths that changed. `allowed` is `checkpoint.allow_changed`."""
        record = RunRecord.read(self.root)
        if record is None or not record.identity:
            return []
        return check_identity(record.identity, unchanged_part(identity, allowed), f"output_dir={str(self.root)!r}")

    def settings(self) -> dict[str, Any]:
        """Reads the resolved configuration of the run that lies here; empty where there is none."""
        return read_settings(self.root) if is_run(self.root) else {}

    def make(self) -> None:
        """Makes the folder. Raises ConfigError when that cannot be."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError(13, "no right to write there", str(self.root))
        except OSError as error:
            raise ConfigError(
                f"output_dir={str(self.root)!r} cannot be made ({one_line(error)}): "
                f"{disk_remedy(error) or 'choose another folder'}"
            ) from None

    def prepare(self, config: RunConfig, identity: dict[str, Any]) -> None:
        """Writes the resolved configuration and where the run was started. Rank 0 only, after `check` and `make`, with
        the lock held."""
        write_file(self.config, dump_config(config))
        RunRecord(os.getcwd(), str(self.root.resolve()), identity).write(self.root)

    def _inside(self) -> list[Path]:
        try:
            return list(self.root.iterdir())
        except OSError as error:
            raise ConfigError(
                f"output_dir={str(self.root)!r} cannot be read ({one_line(error)}): "
                f"{disk_remedy(error) or 'choose another folder'}"
            ) from None
