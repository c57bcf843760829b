"""Which Megatron parameter is made of which Hugging Face tensors: one table per model family.

A new dense family is a new table here plus a row in the tests. Names hold `{layer}`: the global layer index on the
Hugging Face side, the index within the pipeline stage on Megatron's. A row names every Megatron spelling of its
parameter: Transformer Engine keeps a norm's weight inside the linear that follows it, the local layers do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from opd_megatron.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Shard(Enum):
    """How tensor parallelism lays Hugging Face tensors out in one Megatron parameter."""

    REPLICATED = "the same on every rank"
    VOCAB = "rows split after padding to `padded_vocab`"
    ROW = "columns split (the input of a row-parallel linear)"
    COLUMN = "rows split; several tensors (gate, up) are stacked shard by shard"
    QKV = "split by key-value group; each group holds its query heads, then its key, then its value"


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter."""

    megatron: tuple[str, ...]
    """Its possible names; a model has exactly one of them."""
    shard: Shard
    hf: dict[str, tuple[str, ...]]
    """Hugging Face tensors it is made of, in Megatron's order, with their shapes as names of `Dims` fields."""


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes that tensor shapes are made of."""

    layers: int
    vocab: int
    hidden: int
    q: int
    """Query heads times head size."""
    kv: int
    """Key-value groups times head size."""
    ffn: int
    head_dim: int

    @property
    def groups(self) -> int:
        """Key-value groups."""
        return self.kv // self.head_dim

    def shape(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in names)

    @staticmethod
    def of(hf_config: PretrainedConfig) -> Dims:
        heads = hf_config.num_attention_heads
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        return Dims(
            layers=hf_config.num_hidden_layers,
            vocab=hf_config.vocab_size,
            hidden=hf_config.hidden_size,
            q=heads * head_dim,
            kv=(getattr(hf_config, "num_key_value_heads", None) or heads) * head_dim,
            ffn=hf_config.intermediate_size,
            head_dim=head_dim,
        )


@dataclass(frozen=True, slots=True)
class Family:
    """The table of one model family, in the order in which weights are streamed."""

    name: str
    first: tuple[Row, ...]
    """On the first pipeline stage."""
    layer: tuple[Row, ...]
    """Of every transformer layer."""
    last: tuple[Row, ...]
    """On the last pipeline stage, the output layer excepted."""
    head: Row
    """The output layer; with tied embeddings it holds the first row's tensor."""

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return any(name.endswith("linear_qkv.bias") for row in self.layer for name in row.megatron)


_IN = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

_EMBEDDING = Row(("embedding.word_embeddings.weight",), Shard.VOCAB, {"model.embed_tokens.weight": ("vocab", "hidden")})
_FINAL_NORM = Row(("decoder.final_layernorm.weight",), Shard.REPLICATED, {"model.norm.weight": ("hidden",)})
_HEAD = Row(("output_layer.weight",), Shard.VOCAB, {"lm_head.weight": ("vocab", "hidden")})

_INPUT_NORM = Row(
    (_IN + "input_layernorm.weight", _IN + "self_attention.linear_qkv.layer_norm_weight"),
    Shard.REPLICATED,
    {_HF + "input_layernorm.weight": ("hidden",)},
)
_QKV = Row(
    (_IN + "self_attention.linear_qkv.weight",),
    Shard.QKV,
    {
        _HF + "self_attn.q_proj.weight": ("q", "hidden"),
        _HF + "self_attn.k_proj.weight": ("kv", "hidden"),
        _HF + "self_attn.v_proj.weight": ("kv", "hidden"),
    },
)
_QKV_BIAS = Row(
    (_IN + "self_attention.linear_qkv.bias",),
    Shard.QKV,
    {
        _HF + "self_attn.q_proj.bias": ("q",),
        _HF + "self_attn.k_proj.bias": ("kv",),
        _HF + "self_attn.v_proj.bias": ("kv",),
    },
)
_ATTENTION_OUT = Row(
    (_IN + "self_attention.linear_proj.weight",), Shard.ROW, {_HF + "self_attn.o_proj.weight": ("hidden", "q")}
)
_MLP = (
    Row(
        (_IN + "pre_mlp_layernorm.weight", _IN + "mlp.linear_fc1.layer_norm_weight"),
        Shard.REPLICATED,
        {_HF + "post_attention_layernorm.weight": ("hidden",)},
    ),
    Row(
        (_IN + "mlp.linear_fc1.weight",),
        Shard.COLUMN,
        {_HF + "mlp.gate_proj.weight": ("ffn", "hidden"), _HF + "mlp.up_proj.weight": ("ffn", "hidden")},
    ),
    Row((_IN + "mlp.linear_fc2.weight",), Shard.ROW, {_HF + "mlp.down_proj.weight": ("hidden", "ffn")}),
)

LLAMA = Family("llama", (_EMBEDDING,), (_INPUT_NORM, _QKV, _ATTENTION_OUT, *_MLP), (_FINAL_NORM,), _HEAD)
QWEN2 = Family("qwen2", (_EMBEDDING,), (_INPUT_NORM, _QKV, _QKV_BIAS, _ATTENTION_OUT, *_MLP), (_FINAL_NORM,), _HEAD)

FAMILIES: dict[str, Family] = {"LlamaForCausalLM": LLAMA, "MistralForCausalLM": LLAMA, "Qwen2ForCausalLM": QWEN2}
_ARCHITECTURE_OF_TYPE = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# Values of config fields for which the tables and Megatron's layers compute what transformers does.
_SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
# Megatron's rope scaling has these numbers built in; only the factor is free.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def family_of(hf_config: PretrainedConfig) -> Family:
    """The table for a model's config.

    Raises:
        UnsupportedModelError: the architecture has no table, or a field has a value Megatron would not reproduce.
    """
    architecture = architecture_of(hf_config)
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {architecture!r} has no mapping to Megatron: use one of {', '.join(FAMILIES)}"
        )
    for field, supported in _SUPPORTED_VALUES.items():
        value = getattr(hf_config, field, supported[0])
        if value not in supported:
            raise UnsupportedModelError(f"{architecture} with {field}={value!r}: only {supported[0]!r} is supported")
    layer_types = set(getattr(hf_config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise UnsupportedModelError(
            f"{architecture} with layer_types={sorted(layer_types)}: only full_attention is supported"
        )
    _check_rope(architecture, getattr(hf_config, "rope_parameters", None) or {})
    return FAMILIES[architecture]


def architecture_of(hf_config: PretrainedConfig) -> str:
    """Name of the model class the weights are for, e.g. `LlamaForCausalLM`."""
    if hf_config.architectures:
        return hf_config.architectures[0]
    return _ARCHITECTURE_OF_TYPE.get(hf_config.model_type, hf_config.model_type)


def rope_factor(hf_config: PretrainedConfig) -> float | None:
    """By how much Llama 3.1's rope scaling stretches the context; None where there is none."""
    rope = getattr(hf_config, "rope_parameters", None) or {}
    return float(rope["factor"]) if rope.get("rope_type") == "llama3" else None


def _check_rope(architecture: str, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise UnsupportedModelError(f"{architecture} with rope_type={kind!r}: use a model with 'default' or 'llama3'")
    for field, supported in _LLAMA3_ROPE.items() if kind == "llama3" else ():
        if rope.get(field, supported) != supported:
            raise UnsupportedModelError(
                f"{architecture} with llama3 rope {field}={rope[field]}: only {supported} is supported"
            )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{architecture} with partial_rotary_factor={rope['partial_rotary_factor']}: only 1.0 is supported"
        )
