"""Which Megatron parameter is made of which Hugging Face tensors: one table per model family.

A new Llama-like family (RMSNorm, SwiGLU, rotary positions) is a new table here plus a config in the tests; other layers
also need `mcore.model.transformer_config`. Names hold `{layer}` and, for MoE, `{expert}`: global indices on the Hugging
Face side, on Megatron's those within the pipeline stage and the expert-parallel rank. A mapping names every Megatron
spelling of its parameter: Transformer Engine keeps a norm's weight inside the linear that follows it and all experts in
one module, the local layers do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from opd_megatron.errors import UnsupportedModelError
from opd_megatron.weights.model_checks import check_experts, check_fields

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class TPSharding(Enum):
    """How tensor parallelism lays Hugging Face tensors out in one Megatron parameter."""

    REPLICATED = "the same on every rank"
    VOCAB = "rows split after padding to `padded_vocab`"
    ROW = "columns split (the input of a row-parallel linear)"
    COLUMN = "rows split; several tensors (gate, up) are stacked shard by shard"
    QKV = "split by key-value group; each group holds its query heads, then its key, then its value"


@dataclass(frozen=True, slots=True)
class ParamMapping:
    """One Megatron parameter."""

    megatron: tuple[str, ...]
    """Its possible names; a model has exactly one of them."""
    shard: TPSharding
    hf_tensors: dict[str, tuple[str | int, ...]]
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
    experts: int = 0
    """Routed experts of a layer; 0 in a dense model."""
    expert_ffn: int = 0
    shared_ffn: int = 0
    """Of the expert that sees every token, in a family that has it."""

    @property
    def groups(self) -> int:
        """Key-value groups."""
        return self.kv // self.head_dim

    def shape(self, names: tuple[str | int, ...]) -> tuple[int, ...]:
        return tuple(name if isinstance(name, int) else getattr(self, name) for name in names)

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
            experts=getattr(hf_config, "num_experts", None) or 0,
            expert_ffn=getattr(hf_config, "moe_intermediate_size", None) or 0,
            shared_ffn=getattr(hf_config, "shared_expert_intermediate_size", None) or 0,
        )


@dataclass(frozen=True, slots=True)
class Family:
    """The table of one model family, in the order in which weights are streamed."""

    name: str
    first: tuple[ParamMapping, ...]
    """Parameters of the first pipeline stage."""
    layer: tuple[ParamMapping, ...]
    """Parameters of every transformer layer."""
    last: tuple[ParamMapping, ...]
    """Parameters of the last pipeline stage, the output layer excepted."""
    head: ParamMapping
    """The output layer; with tied embeddings it holds the embedding's tensor."""
    experts: tuple[ParamMapping, ...] = ()
    """Parameters of every routed expert of a layer; empty in a dense family."""
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config fields of this family alone, and the values with which its table describes the model."""

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self._has("linear_qkv.bias")

    @property
    def qk_norm(self) -> bool:
        """Whether each head's query and key are normalised."""
        return self._has("q_layernorm.weight")

    @property
    def shared_expert(self) -> bool:
        """Whether one expert of a layer, behind a gate, sees every token."""
        return self._has("shared_experts.gate_weight")

    def _has(self, suffix: str) -> bool:
        return any(name.endswith(suffix) for mapping in self.layer for name in mapping.megatron)


_IN = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

_EMBEDDING = ParamMapping(
    ("embedding.word_embeddings.weight",), TPSharding.VOCAB, {"model.embed_tokens.weight": ("vocab", "hidden")}
)
_FINAL_NORM = ParamMapping(
    ("decoder.final_layernorm.weight",), TPSharding.REPLICATED, {"model.norm.weight": ("hidden",)}
)
_HEAD = ParamMapping(("output_layer.weight",), TPSharding.VOCAB, {"lm_head.weight": ("vocab", "hidden")})

_INPUT_NORM = ParamMapping(
    (_IN + "input_layernorm.weight", _IN + "self_attention.linear_qkv.layer_norm_weight"),
    TPSharding.REPLICATED,
    {_HF + "input_layernorm.weight": ("hidden",)},
)
_QKV = ParamMapping(
    (_IN + "self_attention.linear_qkv.weight",),
    TPSharding.QKV,
    {
        _HF + "self_attn.q_proj.weight": ("q", "hidden"),
        _HF + "self_attn.k_proj.weight": ("kv", "hidden"),
        _HF + "self_attn.v_proj.weight": ("kv", "hidden"),
    },
)
_QKV_BIAS = ParamMapping(
    (_IN + "self_attention.linear_qkv.bias",),
    TPSharding.QKV,
    {
        _HF + "self_attn.q_proj.bias": ("q",),
        _HF + "self_attn.k_proj.bias": ("kv",),
        _HF + "self_attn.v_proj.bias": ("kv",),
    },
)
_ATTENTION_OUT = ParamMapping(
    (_IN + "self_attention.linear_proj.weight",), TPSharding.ROW, {_HF + "self_attn.o_proj.weight": ("hidden", "q")}
)
_QK_NORM = tuple(
    ParamMapping(
        (_IN + f"self_attention.{name}_layernorm.weight",),
        TPSharding.REPLICATED,
        {_HF + f"self_attn.{name}_norm.weight": ("head_dim",)},
    )
    for name in "qk"
)
_MLP = (
    ParamMapping(
        (_IN + "pre_mlp_layernorm.weight", _IN + "mlp.linear_fc1.layer_norm_weight"),
        TPSharding.REPLICATED,
        {_HF + "post_attention_layernorm.weight": ("hidden",)},
    ),
    ParamMapping(
        (_IN + "mlp.linear_fc1.weight",),
        TPSharding.COLUMN,
        {_HF + "mlp.gate_proj.weight": ("ffn", "hidden"), _HF + "mlp.up_proj.weight": ("ffn", "hidden")},
    ),
    ParamMapping((_IN + "mlp.linear_fc2.weight",), TPSharding.ROW, {_HF + "mlp.down_proj.weight": ("hidden", "ffn")}),
)

_ROUTER = (
    ParamMapping(
        (_IN + "pre_mlp_layernorm.weight",),
        TPSharding.REPLICATED,
        {_HF + "post_attention_layernorm.weight": ("hidden",)},
    ),
    ParamMapping((_IN + "mlp.router.weight",), TPSharding.REPLICATED, {_HF + "mlp.gate.weight": ("experts", "hidden")}),
)
_SHARED_EXPERT = (
    ParamMapping(
        (_IN + "mlp.shared_experts.linear_fc1.weight",),
        TPSharding.COLUMN,
        {
            _HF + "mlp.shared_expert.gate_proj.weight": ("shared_ffn", "hidden"),
            _HF + "mlp.shared_expert.up_proj.weight": ("shared_ffn", "hidden"),
        },
    ),
    ParamMapping(
        (_IN + "mlp.shared_experts.linear_fc2.weight",),
        TPSharding.ROW,
        {_HF + "mlp.shared_expert.down_proj.weight": ("hidden", "shared_ffn")},
    ),
    ParamMapping(
        (_IN + "mlp.shared_experts.gate_weight",),
        TPSharding.REPLICATED,
        {_HF + "mlp.shared_expert_gate.weight": (1, "hidden")},
    ),
)
_EXPERT = "mlp.experts.{expert}."
_EXPERTS = (
    ParamMapping(
        (_IN + "mlp.experts.local_experts.{expert}.linear_fc1.weight", _IN + "mlp.experts.linear_fc1.weight{expert}"),
        TPSharding.COLUMN,
        {
            _HF + _EXPERT + "gate_proj.weight": ("expert_ffn", "hidden"),
            _HF + _EXPERT + "up_proj.weight": ("expert_ffn", "hidden"),
        },
    ),
    ParamMapping(
        (_IN + "mlp.experts.local_experts.{expert}.linear_fc2.weight", _IN + "mlp.experts.linear_fc2.weight{expert}"),
        TPSharding.ROW,
        {_HF + _EXPERT + "down_proj.weight": ("hidden", "expert_ffn")},
    ),
)
# Every layer has experts: which layers do not is said by these two fields.
_EVERY_LAYER_SPARSE: dict[str, tuple[Any, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}


def _family(name: str, *layer: ParamMapping, **kwargs: Any) -> Family:
    return Family(name, (_EMBEDDING,), layer, (_FINAL_NORM,), _HEAD, **kwargs)


LLAMA = _family("llama", _INPUT_NORM, _QKV, _ATTENTION_OUT, *_MLP)
QWEN2 = _family("qwen2", _INPUT_NORM, _QKV, _QKV_BIAS, _ATTENTION_OUT, *_MLP)
QWEN3 = _family("qwen3", _INPUT_NORM, _QKV, *_QK_NORM, _ATTENTION_OUT, *_MLP)
QWEN2_MOE = _family(
    "qwen2_moe", _INPUT_NORM, _QKV, _QKV_BIAS, _ATTENTION_OUT, *_ROUTER, *_SHARED_EXPERT,
    experts=_EXPERTS,
    # Its config class writes 0 for a window that is switched off.
    supported={**_EVERY_LAYER_SPARSE, "qkv_bias": (True,), "sliding_window": (None, 0)},
)  # fmt: skip
QWEN3_MOE = _family(
    "qwen3_moe", _INPUT_NORM, _QKV, *_QK_NORM, _ATTENTION_OUT, *_ROUTER, experts=_EXPERTS, supported=_EVERY_LAYER_SPARSE
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
}


def family_of(hf_config: PretrainedConfig) -> Family:
    """Finds the table for a model's config.

    Raises:
        UnsupportedModelError: the architecture has no table, or a field has a value Megatron would not reproduce.
    """
    architecture = architecture_of(hf_config)
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {architecture!r} has no mapping to Megatron: use one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    check_fields(architecture, hf_config, family.supported)
    if family.experts:
        check_experts(architecture, hf_config)
    return family


def sizes_split_by_tensor(hf_config: PretrainedConfig) -> dict[str, int]:
    """Lists by name what a tensor-parallel size must divide."""
    dims, family = Dims.of(hf_config), family_of(hf_config)
    sizes = {"attention heads": hf_config.num_attention_heads, "key-value heads": dims.groups}
    if family.experts:
        sizes["feed-forward columns of an expert"] = dims.expert_ffn
    else:
        sizes["feed-forward columns"] = dims.ffn
    if family.shared_expert:
        sizes["feed-forward columns of the shared expert"] = dims.shared_ffn
    return sizes


def architecture_of(hf_config: PretrainedConfig) -> str:
    """Names the model class that the weights are for, e.g. `LlamaForCausalLM`; of another family, the model type."""
    if hf_config.architectures:
        return hf_config.architectures[0]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    name = NAMES.get(hf_config.model_type)
    return name if isinstance(name, str) and name in FAMILIES else hf_config.model_type
