"""The run directory: what lies in it, and whether it belongs to this run.

config.yaml   metrics.jsonl   rollout.log   tensorboard/   checkpoints/   hf/   report/
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd_megatron.config import RunConfig, dump_config
from opd_megatron.errors import ConfigError

# What a run may not change when it is resumed: another value would make the curves those of two different runs.
_IDENTITY = ("seed", "student", "teachers", "data", "objective")


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
    def hf(self) -> Path:
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
        saved = _flatten({key: (yaml.safe_load(self.config.read_text()) or {}).get(key) for key in _IDENTITY})
        difference = first_difference(dict(saved), run_identity(config))
        if difference is not None:
            key, theirs, ours = difference
            raise ConfigError(
                f"output_dir={str(self.root)!r} belongs to a run with {key}={theirs!r}, this one has {ours!r}: "
                "choose another output_dir, or the same settings to resume"
            )

    def prepare(self, config: RunConfig) -> None:
        """Makes the folder and writes the resolved configuration. Rank 0 only, after `check`."""
        self.root.mkdir(parents=True, exist_ok=True)
        partial = self.config.with_suffix(".partial")
        partial.write_text(dump_config(config))
        partial.replace(self.config)


def run_identity(config: RunConfig) -> dict[str, Any]:
    """What a run may not change when it is resumed, as flat keys: `objective.type`, `teachers.0.path`, ..."""
    tree = config.model_dump(mode="json")
    return dict(_flatten({key: tree[key] for key in _IDENTITY}))


def first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key on which two identities disagree, with both values."""
    for key, value in ours.items():
        if theirs.get(key, value) != value:  # a key the older one lacks had its default then
            return key, theirs[key], value
    return None


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = {str(index): value for index, value in enumerate(tree)}.items()
    else:
        return [(prefix, tree)]
    return [leaf for key, value in items for leaf in _flatten(value, f"{prefix}.{key}" if prefix else str(key))]
