"""Sampling from the student.

base.py           RolloutEngine, the seam
client.py         RolloutClient: one engine, on one rank, looks the same on all
vllm_engine.py    vLLM in a process of its own (vllm_server.py), with our hands in its workers (vllm_worker.py)
torch_engine.py   a plain transformers engine, for tests
child.py          a watched child process
"""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from opd_megatron.config import RunConfig
from opd_megatron.rollout.base import RolloutEngine
from opd_megatron.rollout.client import RolloutClient
from opd_megatron.types import DTYPES
from opd_megatron.weight_sync.format import WeightFormat

__all__ = ["RolloutClient", "RolloutEngine", "build_engine", "weight_format"]


def weight_format(config: RunConfig, hf_config: PretrainedConfig) -> WeightFormat:
    """Says which weights the engine named by `config.rollout` takes; known on ranks without an engine too."""
    rollout = config.rollout
    dtype = DTYPES[rollout.dtype or config.student.dtype]
    if rollout.engine == "torch" or not rollout.shard_to_shard:
        return WeightFormat(dtype, rollout.tensor)
    from opd_megatron.rollout.vllm_engine import vocab_rows

    return WeightFormat(dtype, rollout.tensor, vocab_rows(hf_config.vocab_size, rollout.tensor))


def build_engine(config: RunConfig, model_dir: Path, max_model_len: int, log_path: Path) -> RolloutEngine:
    """Makes the engine named by `config.rollout`, not started yet.

    Args:
        model_dir: folder with the student's HF `config.json`.
        max_model_len: longest prompt plus answer, in tokens.
        log_path: file that the engine's own log is appended to.

    Raises:
        RolloutError: the engine's package is not installed.
    """
    rollout = config.rollout
    dtype = rollout.dtype or config.student.dtype
    if rollout.engine == "torch":
        from opd_megatron.rollout.torch_engine import TorchEngine

        return TorchEngine(model_dir, max_model_len, DTYPES[dtype])
    from opd_megatron.rollout.vllm_engine import VLLMEngine, VLLMOptions

    return VLLMEngine(
        VLLMOptions(
            model_dir=model_dir,
            max_model_len=max_model_len,
            dtype=dtype,
            tensor=rollout.tensor,
            kv_cache_gib=rollout.kv_cache_gib,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            seed=config.seed,
            request_timeout=rollout.request_timeout,
            log_path=log_path,
        )
    )
