"""Real vLLM samples from what was synced, whatever the family: its own code for each has another way with weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd_megatron.rollout.vllm_engine import VLLMEngine, VLLMOptions
from opd_megatron.types import Sampling
from tests.rollout.tiny import VOCAB, prompts_of, reference_logprobs, requests_of
from tests.tiny_models import save_tiny

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": VOCAB, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2_moe": {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 64},  # the kernel pads 48
    "qwen3_moe": {"moe_intermediate_size": 64},
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.long] if name != "qwen3_moe" else []) for name in FAMILIES]
)
def test_after_each_sync_samples_come_from_the_new_weights(tmp_path: Path, family: str) -> None:
    folders = [save_tiny(tmp_path / f"{seed}", family, seed=seed, **SIZES, **FAMILIES[family]) for seed in (0, 1)]
    engine = VLLMEngine(
        VLLMOptions(model_dir=folders[0], max_model_len=256, dtype="fp32", kv_cache_gib=0.1, log_path=tmp_path / "log")
    )
    try:
        engine.wait_ready()
        for version, folder in enumerate(folders):
            tensors = list(load_file(folder / "model.safetensors").items())
            engine.update_weights([tensors[i : i + 10] for i in range(0, len(tensors), 10)], version)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            for rollout in engine.generate(requests_of(prompts_of(3, 200), seed=3), Sampling(max_new_tokens=12)):
                ids = [*rollout.prompt.token_ids, *rollout.response_ids.tolist()]
                expected = reference_logprobs(model, ids)[-len(rollout.response_ids) :]
                assert rollout.logprobs.tolist() == pytest.approx(expected, abs=1e-4)
    finally:
        engine.close()
