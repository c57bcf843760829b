"""Every rule of a run that can be checked before a process group or a model exists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from opd_megatron.config import RunConfig
from opd_megatron.models import ResolvedModels, resolve_models
from opd_megatron.teacher import check_teachers
from opd_megatron.weights.hf_reader import resolve_model


def check_run(config: RunConfig, resolve: Callable[[str], Path] = resolve_model) -> ResolvedModels:
    """Checks the configuration, the models' layouts and, under torchrun, WORLD_SIZE; returns where the models are.

    `resolve` finds the folder of a model; only its config.json is read.

    Raises:
        OPDError: the first rule that is broken: ConfigError for a size that does not fit, MissingPathError and
            UnsupportedModelError for a model.
    """
    config.check_rewards()
    models = resolve_models(config, resolve)
    check_teachers(config, models)
    return models
