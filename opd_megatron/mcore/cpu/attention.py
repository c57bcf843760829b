"""Causal attention through `scaled_dot_product_attention`, for machines without Transformer Engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

# Scores of one layer and micro batch up to which the backward pass recomputes them at once: 64 MiB in fp32.
SCORES_AT_ONCE = 2**24


@dataclass
class Packing(PackedSeqParams):
    """Upstream's, with the lengths on the host as well: reading them from a GPU would wait for it."""

    lengths: tuple[int, ...] = ()


class SdpaCoreAttention(MegatronModule):
    """Attention that stores no scores.

    Sequences are right-padded, so that causality alone keeps real tokens from seeing padding; or they follow each other
    in one row (`Packing`), and each is attended to by itself.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, f"only causal attention, got {attn_mask_type}"
        assert config.context_parallel_size == 1, "this attention sees the whole sequence"
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert dropout == 0, "distillation trains without dropout"
        assert pg_collection is not None
        self.tp_group = pg_collection.tp
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Packing | None = None,
    ) -> torch.Tensor:
        """[S, B, heads, d] queries and [S, B, groups, d] keys and values -> [S, B, heads * d]; packed without B."""
        assert attention_bias is None
        if packed_seq_params is None:
            return self._of_rows(query, key, value)
        lengths = packed_seq_params.lengths
        parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._of_rows(*(each.unsqueeze(1) for each in part)).squeeze(1) for part in parts])

    def _of_rows(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [B, n, S, d]
        batch, heads, length, _ = query.shape
        if query.is_cpu and query.requires_grad and batch * heads * length**2 <= SCORES_AT_ONCE:
            context = _RecomputedAttention.apply(query, key, value, self.scale)
        else:
            context = _attend(query, key, value, self.scale)
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    grouped = key.shape[1] != query.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
    )


class _RecomputedAttention(torch.autograd.Function):
    """The same attention with a backward pass of plain matrix products over recomputed scores.

    For sequences of a few hundred tokens it takes about half the time of torch's own on a CPU (whose blocks are made
    for long ones), and keeps as little between the passes. Queries that share a key-value head (r of them) are rows of
    one product.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        context = _attend(query, key, value, scale)
        ctx.save_for_backward(query, key, value, context)
        ctx.scale = scale
        return context

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """With P = softmax(c Q K'): dV = P' G, dS = P * (G V' - rowsum(G * O)), dQ = c dS K, dK = c dS' Q."""
        query, key, value, context = ctx.saved_tensors
        batch, heads, length, width = query.shape
        pairs, rows = batch * key.shape[1], heads // key.shape[1] * length
        q, g, o = (t.reshape(pairs, rows, width) for t in (query, grad_outputs[0], context))
        k, v = (t.reshape(pairs, length, width) for t in (key, value))
        p = _causal_probabilities(q, k, ctx.scale, length)
        d_v = torch.bmm(p.transpose(1, 2), g)
        d_s = torch.bmm(g, v.transpose(1, 2)).sub_((g * o).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scale)
        d_q, d_k = torch.bmm(d_s, k), torch.bmm(d_s.transpose(1, 2), q)
        return d_q.view(query.shape), d_k.view(key.shape), d_v.view(value.shape), None


def _causal_probabilities(q: torch.Tensor, k: torch.Tensor, scale: float, length: int) -> torch.Tensor:
    """[pairs, r * S, d] and [pairs, S, d] -> softmax of the causal scores, [pairs, r * S, S], in q's dtype."""
    future = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    mask = future.repeat(q.shape[1] // length, 1)
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)
