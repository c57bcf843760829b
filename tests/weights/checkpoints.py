"""Tiny random checkpoints written by transformers, with its own logits beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

# An odd vocabulary divides by no TP size, and at TP 2 the last rank's shard ends in padding.
SIZES: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
    "rope_theta": 5e4, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PADDED_VOCAB = 140

_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "tie_word_embeddings": False,
}  # fmt: skip

# A family's row: its config class and what it has beyond SIZES.
FAMILY_ROWS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2_moe": (Qwen2MoeConfig, {**_EXPERTS, "shared_expert_intermediate_size": 40, "norm_topk_prob": False}),
    "qwen3_moe": (Qwen3MoeConfig, {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
}

# Contexts so short that 64 tokens reach far beyond them: every scaling changes every frequency that it can.
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 3.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0,
        "original_max_position_embeddings": 20,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    config_class, own = FAMILY_ROWS[family]
    return config_class(**{**SIZES, **own, **changes})


CONFIGS: dict[str, PretrainedConfig] = {
    **{family: config_of(family) for family in FAMILY_ROWS},
    **{f"{family}_{rope}": config_of(family, rope_scaling=ROPES[rope]) for family in FAMILY_ROWS for rope in ROPES},
    "llama_tied": config_of("llama"),
    "llama_untied": config_of("llama", tie_word_embeddings=False),
    "llama_wide_heads": config_of("llama", num_key_value_heads=4, head_dim=16, tie_word_embeddings=False),
    "llama_yarn_mscale": config_of(
        "llama",
        rope_scaling=ROPES["yarn"] | {"mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 20.0, "truncate": False},
    ),
    "qwen2_untied": config_of("qwen2", tie_word_embeddings=False),
    "qwen2_moe_normalised": config_of("qwen2_moe", norm_topk_prob=True, num_experts_per_tok=3),
}


def is_moe(name: str) -> bool:
    return "moe" in name


def write_checkpoint(folder: Path, config: PretrainedConfig, *, max_shard_size: str = "1GB") -> Path:
    """Saves a model whose every tensor is random; `expected.pt` holds tokens [2, 64] and logits [2, 64, V]."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # transformers starts norms at one and biases at zero
            if parameter.dim() == 1:
                parameter.uniform_(-0.5, 1.5)
    tokens = torch.randint(config.vocab_size, (2, 64))
    with torch.no_grad():
        logits = model(tokens).logits
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    torch.save({"tokens": tokens, "logits": logits}, folder / "expected.pt")
    return folder
