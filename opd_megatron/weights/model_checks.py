"""Config values that we cannot reproduce in Megatron; they are rejected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd_megatron.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
# Those whose frequencies do not depend on the sequence's length.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_fields(architecture: str, hf_config: PretrainedConfig, own: Mapping[str, tuple[Any, ...]]) -> None:
    """`own`: the fields of the family alone, with the values its table describes.

    Raises:
        UnsupportedModelError: a field has another value.
    """
    for name, supported in {**_SUPPORTED_VALUES, **own}.items():
        value = getattr(hf_config, name, supported[0])
        if value not in supported:
            raise UnsupportedModelError(f"{architecture} with {name}={value!r}: only {supported[0]!r} is supported")
    layer_types = set(getattr(hf_config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise UnsupportedModelError(
            f"{architecture} with layer_types={sorted(layer_types)}: only full_attention is supported"
        )
    _check_rope(architecture, getattr(hf_config, "rope_parameters", None) or {})


def check_experts(architecture: str, hf_config: PretrainedConfig) -> None:
    """Rules of a family with experts.

    Raises:
        UnsupportedModelError: there are none, or Megatron has no such router.
    """
    if not hf_config.num_experts:
        raise UnsupportedModelError(f"{architecture} with num_experts=0: use the dense architecture of that family")
    if hf_config.num_experts_per_tok == 1 and hf_config.norm_topk_prob:
        raise UnsupportedModelError(
            f"{architecture} with norm_topk_prob=True and num_experts_per_tok=1: only False is supported, "
            "a single weight normalised to 1 teaches the router nothing"
        )


def _check_rope(architecture: str, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"{architecture} with rope_type={kind!r}: use a model with one of {', '.join(_ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{architecture} with partial_rotary_factor={rope['partial_rotary_factor']}: only 1.0 is supported"
        )
