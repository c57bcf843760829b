"""Norm and attention equal torch's own, values and gradients, in every dtype and grouping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from opd_megatron.mcore.cpu import attention
from opd_megatron.mcore.cpu.attention import SdpaCoreAttention
from opd_megatron.mcore.cpu.norm import _RMSNorm
from opd_megatron.mcore.cpu.platform import init_platform


def _error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_norm_equals_float64_reference(dtype: torch.dtype, limit: float, permuted: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 48).mul_(3).to(dtype)
    x = x.transpose(0, 1) if permuted else x
    weight, gradient = (1 + torch.randn(48) / 4).to(dtype), torch.randn(x.shape).to(dtype)
    inputs = [x.detach().requires_grad_(), weight.requires_grad_()]
    ours = _RMSNorm.apply(*inputs, 1e-5)
    ours.backward(gradient)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    reference = torch.nn.functional.rms_norm(exact[0], (48,), exact[1], 1e-5)
    reference.backward(gradient.double())
    assert ours.dtype == dtype
    for mine, theirs in [(ours, reference), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]:
        assert _error(mine, theirs) < limit


def _core() -> SdpaCoreAttention:
    init_platform()
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, kv_channels=16, attention_dropout=0.0, hidden_dropout=0.0
    )
    groups: Any = SimpleNamespace(tp=None)
    return SdpaCoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 19])
@pytest.mark.parametrize("at_once", [True, False], ids=["recomputed", "torch"])
def test_attention_equals_float64_reference(
    dtype: torch.dtype, limit: float, groups: int, length: int, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(attention, "SCORES_AT_ONCE", 0)
    torch.manual_seed(0)
    inputs = [torch.randn(length, 3, n, 16).to(dtype).requires_grad_() for n in (4, groups, groups)]
    gradient = torch.randn(length, 3, 64).to(dtype)
    ours = _core()(*inputs, None)
    ours.backward(gradient)

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in exact)
    key, value = (tensor.repeat_interleave(4 // groups, dim=1) for tensor in (key, value))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(-1, -2) / 4).masked_fill(future, -torch.inf).softmax(-1)
    reference = (scores @ value).permute(2, 0, 1, 3).reshape(length, 3, 64)
    reference.backward(gradient.double())
    pairs = [(ours, reference), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    for mine, theirs in pairs:
        assert mine is not None
        assert theirs is not None
        # With one token there is nothing to choose between: the true gradient of queries and keys is 0.
        assert (mine - theirs).norm() <= limit * max(theirs.norm().item(), 1.0)
