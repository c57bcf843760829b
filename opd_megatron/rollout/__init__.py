"""Sampling from the student: the engine protocol, vLLM in its own process, a plain torch engine, the sampler."""

from __future__ import annotations

from pathlib import Path

from opd_megatron.config import RunConfig
from opd_megatron.rollout.base import RolloutEngine
from opd_megatron.rollout.client import RolloutClient

__all__ = ["RolloutClient", "RolloutEngine", "build_engine"]


def build_engine(config: RunConfig, model_dir: Path, max_model_len: int, log_path: Path) -> RolloutEngine:
    """The engine that `config.rollout` names, not started yet.

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
        import torch

        from opd_megatron.rollout.torch_engine import TorchEngine

        return TorchEngine(model_dir, max_model_len, torch.bfloat16 if dtype == "bf16" else torch.float32)
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
