"""Tiny random checkpoints written by transformers, with its own logits beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config
from transformers.models.auto import AutoModelForCausalLM

# An odd vocabulary divides by no TP size, and at TP 2 the last rank's shard ends in padding.
SIZES: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16384, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
    "rope_theta": 5e4, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PADDED_VOCAB = 140

CONFIGS: dict[str, PretrainedConfig] = {
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_wide_heads": LlamaConfig(**(SIZES | {"num_key_value_heads": 4}), head_dim=16, tie_word_embeddings=False),
    "llama_rope_scaled": LlamaConfig(
        **SIZES,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2_tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2_untied": Qwen2Config(**SIZES, tie_word_embeddings=False),
}


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
