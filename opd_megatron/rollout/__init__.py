"""Sampling from the student.

base.py           RolloutEngine, the seam
client.py         RolloutClient: a fleet of engines, on any ranks, looks like one on all
shares.py         which engine samples which requests
side_by_side.py   engines of one rank at the same time
vllm_engine.py    vLLM in a process of its own (vllm_server.py), with our hands in its workers (vllm_worker.py)
turns.py          whether engines give their memory back while the student trains
torch_engine.py   a plain transformers engine, for tests
child.py          a watched child process; shared_memory.py removes what it leaves

A new engine is a file with a class, a `weight_format` and a `build_engine`, and a line in `ENGINES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from opd_megatron.config import RunConfig
from opd_megatron.rollout.base import WHOLE_MACHINE, MachineShare, RolloutEngine
from opd_megatron.rollout.client import RolloutClient
from opd_megatron.weight_sync.format import WeightFormat

__all__ = ["MachineShare", "RolloutClient", "RolloutEngine", "build_engine", "weight_format"]

ENGINES = {"vllm": "opd_megatron.rollout.vllm_engine", "torch": "opd_megatron.rollout.torch_engine"}
"""`rollout.engine` -> its module, imported when it is chosen."""


def weight_format(config: RunConfig, hf_config: PretrainedConfig) -> WeightFormat:
    """Says which weights the engine named by `config.rollout` takes; known on ranks without an engine too."""
    found: WeightFormat = _module(config).weight_format(config, hf_config)
    return found


def build_engine(
    config: RunConfig, model_dir: Path, max_model_len: int, log_path: Path, banned_ids: Sequence[int] = (),
    overrides: Mapping[str, Any] | None = None, share: MachineShare = WHOLE_MACHINE,
) -> RolloutEngine:  # fmt: skip
    """Makes the engine named by `config.rollout`, not started yet.

    Args:
        model_dir: folder with the student's HF `config.json`.
        max_model_len: longest prompt plus answer, in tokens.
        log_path: file that the engine's own log is appended to.
        banned_ids: ids that are never sampled.
        overrides: fields of config.json that the weights say otherwise.
        share: what of the machine is this engine's.

    Raises:
        RolloutError: the engine's package is not installed.
    """
    build = _module(config).build_engine
    engine: RolloutEngine = build(config, model_dir, max_model_len, log_path, banned_ids, overrides, share)
    return engine


def _module(config: RunConfig) -> Any:
    return importlib.import_module(ENGINES[config.rollout.engine])
