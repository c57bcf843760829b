"""Causal attention through `scaled_dot_product_attention`, for machines without Transformer Engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from opd_megatron.data.context import natural_order

# Scores of one layer and micro batch up to which the backward pass recomputes them at once: 64 MiB in fp32.
SCORES_AT_ONCE = 2**24


@dataclass
class Packing(PackedSeqParams):
    """Upstream's, with the lengths on the host as well: reading them from a GPU would wait for it."""

    lengths: tuple[int, ...] = ()
    """Of the whole sequences, also where context-parallel ranks have parts of them."""
    order: torch.Tensor | None = None
    """`data.context.natural_order` of them, with context parallelism."""


class SdpaCoreAttention(MegatronModule):
    """Attention that stores no scores.

    Sequences are right-padded, so that causality alone keeps real tokens from seeing padding; or they follow each other
    in one row (`Packing`), and each is attended to by itself. Context-parallel ranks gather each other's keys and
    values, which are few with grouped queries; the gradient of them goes back the same way.
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
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert dropout == 0, "distillation trains without dropout"
        assert pg_collection is not None
        self.tp_group = pg_collection.tp
        self.cp_group: dist.ProcessGroup | None = getattr(pg_collection, "cp", None)
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
        if self.cp_group is not None and self.cp_group.size() > 1:
            return self._of_chunks(query, key, value, packed_seq_params, self.cp_group)
        parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._of_rows(*(each.unsqueeze(1) for each in part)).squeeze(1) for part in parts])

    def _of_chunks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, group: dist.ProcessGroup
    ) -> torch.Tensor:
        """Attention of this rank's two chunks of every sequence to all that is before them (`data.context`)."""
        rank, ranks = group.rank(), group.size()
        assert packing.order is not None
        # All-gather forward, reduce-scatter backward: every rank has a part of the gradient of all keys.
        both = gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=group)
        key, value = both.index_select(0, packing.order).chunk(2, -1)
        found, taken = [], 0
        for start, length in zip(_starts(packing.lengths), packing.lengths, strict=True):
            chunk = length // (2 * ranks)
            for number in (rank, 2 * ranks - 1 - rank):
                before = number * chunk
                rows = query[taken : taken + chunk].unsqueeze(1).permute(1, 2, 0, 3)
                keys, values = (
                    each[start : start + before + chunk].unsqueeze(1).permute(1, 2, 0, 3) for each in (key, value)
                )
                context = _LaterAttention.apply(rows, keys, values, self.scale)
                found.append(context.permute(2, 0, 1, 3).reshape(chunk, -1))
                taken += chunk
        return torch.cat(found)

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


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths[:-1])]


def packing_of(lengths: tuple[int, ...], device: torch.device, *, context: int, on_host: bool) -> Packing:
    """What attention and rotary positions must know of a packed row.

    Args:
        lengths: of the whole sequences.
        context: context-parallel size.
        on_host: without what kernels read on a GPU: our own attention and positions need none of it.
    """
    if on_host:
        order = natural_order(lengths, context).to(device) if context > 1 else None
        return Packing(qkv_format="thd", max_seqlen_q=1, max_seqlen_kv=1, lengths=lengths, order=order)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    # Upstream keeps a table of angles for each bound, so there are few; one that equals the row's length would let
    # positions run on from sequence to sequence.
    longest = 1 << (max(lengths) - 1).bit_length()
    longest += longest == sum(lengths)
    return Packing(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds, max_seqlen_q=longest, max_seqlen_kv=longest, lengths=lengths,
    )  # fmt: skip


class _LaterAttention(torch.autograd.Function):
    """Causal attention of the last rows of a sequence to all of it, in blocks of rows that bound the scores.

    [B, heads, s, d] queries, [B, groups, S, d] keys and values of the sequence that ends where the queries do.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        context = torch.empty_like(query)
        for rows, mask in _blocks(query, key):
            context[:, :, rows] = torch.nn.functional.scaled_dot_product_attention(
                query[:, :, rows], key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]], attn_mask=mask,
                scale=scale, enable_gqa=key.shape[1] != query.shape[1],
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, context)
        ctx.scale = scale
        return context

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """As `_RecomputedAttention`, block by block of the queries."""
        query, key, value, context = ctx.saved_tensors
        # Sums over blocks, in fp32: in bf16 they would be rounded once a block.
        wide = torch.promote_types(key.dtype, torch.float32)
        d_q, d_k, d_v = torch.empty_like(query), *(torch.zeros_like(each, dtype=wide) for each in (key, value))
        batch, heads, _, width = query.shape
        pairs = batch * key.shape[1]
        for rows, mask in _blocks(query, key):
            q, g, o = (each[:, :, rows].reshape(pairs, -1, width) for each in (query, grad_outputs[0], context))
            k, v = (each[:, :, : mask.shape[1]].reshape(pairs, -1, width) for each in (key, value))
            future = mask.repeat(heads // key.shape[1], 1)
            p = torch.baddbmm(future, q, k.transpose(1, 2), alpha=ctx.scale).softmax(-1)
            of_queries, *of_others = _gradients(q, k, v, g, o, p, ctx.scale)
            d_q[:, :, rows] = of_queries.view(batch, heads, -1, width)
            for total, part in zip((d_k, d_v), of_others, strict=True):
                total[:, :, : mask.shape[1]] += part.view(batch, key.shape[1], -1, width)
        return d_q, d_k.to(key.dtype), d_v.to(value.dtype), None


def _blocks(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of the queries, and what is added to their scores: [rows, keys up to the last of them]."""
    batch, heads, length, _ = query.shape
    whole = key.shape[2]
    size = max(1, min(length, SCORES_AT_ONCE // (batch * heads * whole)))
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = whole - length + start
        mask = query.new_full((stop - start, whole - length + stop), -torch.inf).triu_(first + 1)
        yield slice(start, stop), mask


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
        """See `_gradients`."""
        query, key, value, context = ctx.saved_tensors
        batch, heads, length, width = query.shape
        pairs, rows = batch * key.shape[1], heads // key.shape[1] * length
        q, g, o = (t.reshape(pairs, rows, width) for t in (query, grad_outputs[0], context))
        k, v = (t.reshape(pairs, length, width) for t in (key, value))
        p = _causal_probabilities(q, k, ctx.scale, length)
        d_q, d_k, d_v = _gradients(q, k, v, g, o, p, ctx.scale)
        return d_q.view(query.shape), d_k.view(key.shape), d_v.view(value.shape), None


def _gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, o: torch.Tensor, p: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With P = softmax(c Q K'): dV = P' G, dS = P * (G V' - rowsum(G * O)), dQ = c dS K, dK = c dS' Q. Matrices of
    several pairs of heads."""
    d_v = torch.bmm(p.transpose(1, 2), g)
    d_s = torch.bmm(g, v.transpose(1, 2)).sub_((g * o).sum(-1, keepdim=True)).mul_(p).mul_(scale)
    return torch.bmm(d_s, k), torch.bmm(d_s.transpose(1, 2), q), d_v


def _causal_probabilities(q: torch.Tensor, k: torch.Tensor, scale: float, length: int) -> torch.Tensor:
    """[pairs, r * S, d] and [pairs, S, d] -> softmax of the causal scores, [pairs, r * S, S], in q's dtype."""
    future = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    mask = future.repeat(q.shape[1] // length, 1)
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)
