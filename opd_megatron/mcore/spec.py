"""Which modules a transformer layer is made of: Transformer Engine on a GPU, plain torch elsewhere."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from opd_megatron.mcore.platform import has_gpu


def use_transformer_engine(choice: str) -> bool:
    """Whether `student.transformer_engine=choice` means Transformer Engine layers on this machine."""
    return choice == "auto" and has_gpu() and importlib.util.find_spec("transformer_engine") is not None


def block_spec(config: TransformerConfig, num_layers: int, *, transformer_engine: bool) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage and the final norm (which the block builds on the last stage only)."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(module=SdpaCoreAttention)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may run under sequence parallelism.

    The stock wrapper refuses it; all it takes is to mark the weight, so that `finalize_model_grads` sums its
    gradient over the tensor-parallel ranks, each of which saw a slice of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


class SdpaCoreAttention(MegatronModule):
    """Causal attention through `scaled_dot_product_attention`, which never stores the scores.

    Sequences are right-padded, so that causality alone keeps real tokens from seeing padding.
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
        assert pg_collection is not None
        self.tp_group = pg_collection.tp
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """[S, B, heads, d] queries and [S, B, groups, d] keys and values -> [S, B, heads * d]."""
        assert packed_seq_params is None
        assert attention_bias is None
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [B, n, S, d]
        context = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        length, batch = context.shape[2], context.shape[0]
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)
