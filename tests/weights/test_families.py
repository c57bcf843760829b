from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config
from transformers.models.auto import AutoModelForCausalLM

from opd_megatron.errors import UnsupportedModelError
from opd_megatron.weights.families import FAMILIES, LLAMA, QWEN2, family_of
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.plan import build_plan, hf_shapes
from tests.weights.checkpoints import CONFIGS, SIZES

QWEN2_72B = Qwen2Config(
    vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8,
)  # fmt: skip


@pytest.mark.parametrize("config", [*CONFIGS.values(), QWEN2_72B], ids=[*CONFIGS, "qwen2_72b"])
def test_the_table_names_exactly_the_tensors_of_transformers(config: PretrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert hf_shapes(config) == theirs


@pytest.mark.parametrize(("tp", "pp", "padded_vocab"), [(1, 1, 152064), (8, 4, 152064), (8, 2, 262144)])
def test_shards_of_all_ranks_cover_every_element_once(tp: int, pp: int, padded_vocab: int) -> None:
    """At 262144 padded rows the last three of eight tensor-parallel ranks hold no vocabulary at all."""
    covered = dict.fromkeys(hf_shapes(QWEN2_72B), 0)
    for pp_rank in range(pp):
        layout = ShardLayout(padded_vocab, pp_rank * 80 // pp, 80 // pp, tp_size=tp, pp_rank=pp_rank, pp_size=pp)
        plan = build_plan(QWEN2_72B, layout)
        for entry in plan.stage(pp_rank):
            for tp_rank in range(1 if len(plan.shard_shape(entry, layout)) == 1 and "norm" in str(entry.hf) else tp):
                for piece in plan.pieces(entry, layout, tp_rank):
                    shape = entry.hf[piece.name]
                    assert 0 <= piece.start < piece.start + piece.length <= shape[piece.dim]
                    covered[piece.name] += piece.length * math.prod(shape) // shape[piece.dim]
    assert covered == {name: math.prod(shape) for name, shape in hf_shapes(QWEN2_72B).items()}


def test_families_are_chosen_by_architecture_or_model_type() -> None:
    assert family_of(LlamaConfig(**SIZES)) is LLAMA
    assert family_of(MistralConfig(**SIZES, sliding_window=None)) is LLAMA
    assert family_of(Qwen2Config(**SIZES, architectures=["Qwen2ForCausalLM"])) is QWEN2
    assert QWEN2.qkv_bias
    assert not LLAMA.qkv_bias


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GPT2Config(), "'gpt2'"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "'LlamaForSequenceClassification'"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act='gelu'"),
        (LlamaConfig(attention_bias=True), "attention_bias=True"),
        (LlamaConfig(mlp_bias=True), "mlp_bias=True"),
        (LlamaConfig(pretraining_tp=2), "pretraining_tp=2"),
        (LlamaConfig(quantization_config={"quant_method": "awq"}), "quantization_config={'quant_method': 'awq'}"),
        (MistralConfig(), "sliding_window=4096"),
        (Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=4), "sliding_window=64"),
        (Qwen2Config(rope_parameters=_YARN), "rope_type='yarn'"),
        (LlamaConfig(rope_parameters=_LLAMA3 | {"original_max_position_embeddings": 64}), "max_position_embeddings=64"),
    ],
)
def test_what_megatron_would_not_reproduce_is_refused_by_name(config: PretrainedConfig, named: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        family_of(config)
    message = str(error.value)
    assert named in message
    assert "\n" not in message
    assert "supported" in message or "use " in message


def test_every_architecture_names_a_family() -> None:
    assert set(FAMILIES) == {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}
