"""Rotary frequencies as transformers computes them, whatever the scaling.

Megatron-Core has a class for each scaling, with constants built in and a mixture of frequencies of its own for YaRN.
Its plain class multiplies positions by `inv_freq` and no more, so that transformers' own functions can say what those
are: one seam for linear, Llama 3 and YaRN scaling alike.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from opd_megatron.weights.families import Dims


def inverse_frequencies(hf_config: PretrainedConfig) -> torch.Tensor:
    """Computes [head_dim / 2] in fp32, on the CPU: radians a position, fastest first."""
    return _parameters(hf_config)[0]


def attention_factor(hf_config: PretrainedConfig) -> float:
    """Computes the factor of rotated queries and keys; 1 except with YaRN."""
    return float(_parameters(hf_config)[1])


def rope_theta(hf_config: PretrainedConfig) -> float:
    """Reads the base of the rotary frequencies; its place in the config moved in transformers 5."""
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(hf_config, "rope_theta", None) or 10000.0)


def _parameters(hf_config: PretrainedConfig) -> tuple[torch.Tensor, float]:
    kind = (getattr(hf_config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind == "default":
        size = Dims.of(hf_config).head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.int64, device="cpu").float() / size
        return 1.0 / rope_theta(hf_config) ** exponents, 1.0
    return ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
