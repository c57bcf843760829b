"""The settings that must not change when a run is resumed, as flat keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd_megatron.config import RunConfig
from opd_megatron.errors import CheckpointError
from opd_megatron.models import ResolvedModels

_ARCHITECTURE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
"""Keys of an HF config.json that tell one model from another; a folder's content may change under its name."""
# What a run may not change when it is resumed: another value would make the curves those of two different runs.
_IDENTITY = ("seed", "student", "teachers", "data", "objective")


def identity_of(tree: dict[str, Any]) -> dict[str, Any]:
    """Flattens the settings that a run may not change: `objective.type`, `teachers.0.path`, ..."""
    return dict(_flatten({key: tree.get(key) for key in _IDENTITY}))


def checkpoint_identity(config: RunConfig, models: ResolvedModels) -> dict[str, Any]:
    """Collects what a checkpoint must agree with to belong to this run: its settings and its model."""
    hf_config = models.student_config
    return identity_of(config.model_dump(mode="json")) | {
        f"model.{name}": getattr(hf_config, name, None) for name in _ARCHITECTURE
    }


def first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Finds the first key on which two identities disagree, with both values."""
    for key, value in ours.items():
        if theirs.get(key, value) != value:  # a key the older one lacks had its default then
            return key, theirs[key], value
    return None


def check_identity(theirs: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError when the checkpoint at `path`, saved with `theirs`, is another run's or another
    model's."""
    difference = first_difference(theirs, ours)
    if difference is not None:
        key, their_value, our_value = difference
        raise CheckpointError(
            f"checkpoint {str(path)!r} belongs to a run with {key}={their_value!r}, this one has {our_value!r}: "
            "choose another output_dir, or the same settings to resume"
        )


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = {str(index): value for index, value in enumerate(tree)}.items()
    else:
        return [(prefix, tree)]
    return [leaf for key, value in items for leaf in _flatten(value, f"{prefix}.{key}" if prefix else str(key))]
