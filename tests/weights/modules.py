"""Stand-ins for Megatron modules: parameters with its names, nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PretrainedConfig

from opd_megatron.weights.layout import ShardLayout


def module_of(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module whose parameters have these dotted names and shapes, all NaN."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in dict(node.named_children()):
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.register_parameter(leaf, nn.Parameter(torch.full(shape, float("nan"), dtype=dtype)))
    return root


def llama_shapes(
    config: PretrainedConfig, layout: ShardLayout, *, transformer_engine: bool = False
) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of a Megatron Llama stage, written out from Megatron's own conventions."""
    hidden, ffn, tp = config.hidden_size, config.intermediate_size, layout.tp_size
    experts = getattr(config, "num_experts", 0)
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    if experts:
        norms = (norms[0] if transformer_engine else "input_layernorm.weight", "pre_mlp_layernorm.weight")
    elif not transformer_engine:
        norms = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    shapes: dict[str, tuple[int, ...]] = {}
    if layout.is_first_stage:
        shapes["embedding.word_embeddings.weight"] = (layout.padded_vocab // tp, hidden)
    for layer in range(layout.num_layers):
        prefix = f"decoder.layers.{layer}."
        shapes |= {prefix + name: (hidden,) for name in norms}
        shapes[prefix + "self_attention.linear_qkv.weight"] = ((q + 2 * kv) // tp, hidden)
        shapes[prefix + "self_attention.linear_proj.weight"] = (hidden, q // tp)
        if experts:
            shapes |= {prefix + name: shape for name, shape in _sparse(config, layout, transformer_engine).items()}
            continue
        shapes[prefix + "mlp.linear_fc1.weight"] = (2 * ffn // tp, hidden)
        shapes[prefix + "mlp.linear_fc2.weight"] = (hidden, ffn // tp)
    if layout.is_last_stage:
        shapes["decoder.final_layernorm.weight"] = (hidden,)
        if layout.pp_size > 1 or not config.tie_word_embeddings:
            shapes["output_layer.weight"] = (layout.padded_vocab // tp, hidden)
    return shapes


def _sparse(config: PretrainedConfig, layout: ShardLayout, transformer_engine: bool) -> dict[str, tuple[int, ...]]:
    """What a Qwen3-MoE layer has beyond norms, projections and output of the attention."""
    hidden, ffn, tp = config.hidden_size, config.moe_intermediate_size, layout.tp_size
    name = "mlp.experts.{fc}.weight{i}" if transformer_engine else "mlp.experts.local_experts.{i}.{fc}.weight"
    shapes: dict[str, tuple[int, ...]] = {
        "self_attention.q_layernorm.weight": (config.head_dim,),
        "self_attention.k_layernorm.weight": (config.head_dim,),
        "mlp.router.weight": (config.num_experts, hidden),
    }
    for i in range(config.num_experts // layout.ep_size):
        shapes[name.format(fc="linear_fc1", i=i)] = (2 * ffn // tp, hidden)
        shapes[name.format(fc="linear_fc2", i=i)] = (hidden, ffn // tp)
    return shapes
