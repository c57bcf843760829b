"""The typed run configuration: YAML + `a.b=value` overrides, every rule checked before a process group exists.

Adding an option means adding a field with its `description`; `--help`, the resolved `config.yaml` and the error
messages follow from it. The types and keys of `objective:` come from `losses.objectives`. Rules that need the model's
own `config.json` (heads, layers, vocabulary) live in `models.rules`, checked before any process group exists too.
"""

from opd_megatron.config.loading import build_config, dump_config, load_config, sections_of, set_by_path
from opd_megatron.config.objective import ObjectiveConfig
from opd_megatron.config.precision import decide_precision, decided, take_precision
from opd_megatron.config.rewards import RewardsConfig
from opd_megatron.config.run import DEFAULT_ROUTE, RunConfig
from opd_megatron.config.sections import (
    GOLD,
    CheckpointConfig,
    DataConfig,
    DataSourceConfig,
    Dtype,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    PrecisionConfig,
    RolloutConfig,
    Section,
    StudentConfig,
)
from opd_megatron.config.teachers import (
    CachedTeacherConfig,
    MegatronTeacherConfig,
    OwnRanksTeacherConfig,
    ServedTeacherConfig,
    StudentRanksTeacherConfig,
    TeacherConfig,
)

__all__ = [
    "DEFAULT_ROUTE",
    "GOLD",
    "CachedTeacherConfig",
    "CheckpointConfig",
    "DataConfig",
    "DataSourceConfig",
    "Dtype",
    "EvaluationConfig",
    "LoggingConfig",
    "MegatronTeacherConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OwnRanksTeacherConfig",
    "ParallelConfig",
    "Precision",
    "PrecisionConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "ServedTeacherConfig",
    "StudentConfig",
    "StudentRanksTeacherConfig",
    "TeacherConfig",
    "build_config",
    "decide_precision",
    "decided",
    "dump_config",
    "load_config",
    "sections_of",
    "set_by_path",
    "take_precision",
]
