"""How much of the hardware training uses: model FLOPs utilization (MFU, arXiv 2204.02311, appendix B)."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from opd_megatron.models.gpus import GPUS
from opd_megatron.models.sizes import LayerSizes

_SIZE, _ATTEMPTS = 1024, 5


def training_flops(hf_config: PretrainedConfig, lengths: Sequence[int], response_tokens: int) -> float:
    """Counts the operations that an update of a model needs: forward and backward through its layers of sequences of so
    many tokens, causal attention at its half, the head on response tokens. What is done twice to save memory, padding
    and teachers do not count."""
    layer = LayerSizes.of(hf_config)
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    body = hf_config.num_hidden_layers * (2.0 * layer.matmul_params * tokens + 2.0 * layer.query * squares)
    return 3 * (body + 2.0 * response_tokens * hf_config.vocab_size * hf_config.hidden_size)


@functools.cache
def peak_flops(dtype: torch.dtype, *, fp8: bool = False) -> float:
    """Operations a second of this rank's device: published ones of a GPU that `models.gpus` knows, else what a large
    product reaches here and now. On a CPU ranks that share it must ask at the same time."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in name), None)
        if known is not None:
            return known.fp8_flops if fp8 and known.fp8_flops else known.bf16_flops
    return _measured(dtype)


def _measured(dtype: torch.dtype) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.ones(_SIZE, _SIZE, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(_ATTEMPTS):
        begin = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * _SIZE**3 / best
