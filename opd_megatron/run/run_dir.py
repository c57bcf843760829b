"""The run directory: what lies in it, and whether it belongs to this run.

config.yaml   metrics.jsonl   rollout.log   tensorboard/   checkpoints/   hf/   report/
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_megatron.config import RunConfig, dump_config
from opd_megatron.errors import ConfigError
from opd_megatron.run.identity import first_difference, identity_of
from opd_megatron.system.atomic import write_file
from opd_megatron.system.reading import read_yaml_mapping


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

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
    def rollout_log(self) -> Path:
        return self.root / "rollout.log"

    def check(self, config: RunConfig) -> None:
        """Raises ConfigError when the folder holds another run, or something that is not a run."""
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise ConfigError(f"output_dir={str(self.root)!r} must be a folder, it is a file: choose another name")
        if not self.config.exists():
            if any(self.root.iterdir()):
                raise ConfigError(
                    f"output_dir={str(self.root)!r} is not empty and holds no run's config.yaml: choose another folder"
                )
            return
        saved = self.settings()
        difference = first_difference(identity_of(saved), identity_of(config.model_dump(mode="json")))
        if difference is not None:
            key, theirs, ours = difference
            raise ConfigError(
                f"output_dir={str(self.root)!r} belongs to a run with {key}={theirs!r}, this one has {ours!r}: "
                "choose another output_dir, or the same settings to resume"
            )

    def settings(self) -> dict[str, Any]:
        """Reads the resolved configuration of the run that lies here; empty where there is none."""
        if not self.config.exists():
            return {}
        return read_yaml_mapping(self.config, ConfigError, "restore the file, or choose another output_dir")

    def prepare(self, config: RunConfig) -> None:
        """Makes the folder and writes the resolved configuration. Rank 0 only, after `check`."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_file(self.config, dump_config(config))
