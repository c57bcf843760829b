"""Tiny random Hugging Face folders for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_tiny(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A random model with an even number of heads, saved with `save_pretrained`. `changes` go into its config."""
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        Qwen2Config,
        Qwen2MoeConfig,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    families: dict[str, Any] = {
        "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen2_moe": Qwen2MoeConfig,
        "qwen3_moe": Qwen3MoeConfig,
    }  # fmt: skip
    experts = {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "norm_topk_prob": family == "qwen3_moe",
        **({"shared_expert_intermediate_size": 48} if family == "qwen2_moe" else {}),
    }  # fmt: skip
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 272,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,  # large enough that two random models differ by whole nats
        **({"head_dim": 24} if "qwen3" in family else {}),
        **(experts if "moe" in family else {}),
        **changes,
    }
    config = families[family](**settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases start constant: make mistakes in them visible
                parameter.add_(torch.randn_like(parameter) * 0.1 if "norm" in name else torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
