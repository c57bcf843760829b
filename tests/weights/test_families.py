from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto import AutoModelForCausalLM

from opd_megatron.errors import UnsupportedModelError
from opd_megatron.mcore.rope import attention_factor, inverse_frequencies
from opd_megatron.weights.families import FAMILIES, LLAMA, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, TPSharding, family_of
from opd_megatron.weights.hf_reader import load_hf_config
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.sharding import hf_shapes, sharding_table
from tests.weights.checkpoints import CONFIGS, SIZES, config_of

QWEN2_72B = Qwen2Config(
    vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8,
)  # fmt: skip
QWEN3_30B_A3B = Qwen3MoeConfig(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
    norm_topk_prob=True,
)  # fmt: skip


def test_the_tables_name_exactly_the_tensors_that_transformers_saves(checkpoints: dict[str, Path]) -> None:
    for name, folder in checkpoints.items():
        saved = load_file(folder / "model.safetensors")
        assert hf_shapes(CONFIGS[name]) == {tensor: tuple(value.shape) for tensor, value in saved.items()}, name


def test_the_table_fits_a_real_size() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(QWEN2_72B)
    assert hf_shapes(QWEN2_72B) == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("tp", "pp", "padded_vocab"), [(1, 1, 152064), (8, 4, 152064), (8, 2, 262144)])
def test_shards_of_all_ranks_cover_every_element_once(tp: int, pp: int, padded_vocab: int) -> None:
    """At 262144 padded rows the last three of eight tensor-parallel ranks hold no vocabulary at all."""
    covered = dict.fromkeys(hf_shapes(QWEN2_72B), 0)
    for pp_rank in range(pp):
        layout = ShardLayout(padded_vocab, pp_rank * 80 // pp, 80 // pp, tp_size=tp, pp_rank=pp_rank, pp_size=pp)
        plan = sharding_table(QWEN2_72B, layout)
        for entry in plan.stage(pp_rank):
            for tp_rank in range(
                1 if len(plan.shard_shape(entry, layout)) == 1 and "norm" in str(entry.hf_tensors) else tp
            ):
                for piece in plan.pieces(entry, layout, tp_rank):
                    shape = entry.hf_tensors[piece.name]
                    assert 0 <= piece.start < piece.start + piece.length <= shape[piece.dim]
                    covered[piece.name] += piece.length * math.prod(shape) // shape[piece.dim]
    assert covered == {name: math.prod(shape) for name, shape in hf_shapes(QWEN2_72B).items()}


@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 1, 1), (2, 2, 4), (4, 1, 8)])
def test_experts_are_held_by_one_expert_parallel_rank_each(tp: int, pp: int, ep: int) -> None:
    """Of Qwen3-30B-A3B: every element of every tensor is covered once over all ranks that do not share it."""
    covered = dict.fromkeys(hf_shapes(QWEN3_30B_A3B), 0)
    for pp_rank, ep_rank in itertools.product(range(pp), range(ep)):
        layout = ShardLayout(
            152064, pp_rank * 48 // pp, 48 // pp, tp_size=tp, pp_rank=pp_rank, pp_size=pp, ep_rank=ep_rank, ep_size=ep
        )
        plan = sharding_table(QWEN3_30B_A3B, layout)
        for entry in plan.stage(pp_rank, ep_rank):
            shared = entry.expert_rank is None
            assert shared or entry.expert_rank == ep_rank
            ranks = 1 if entry.shard is TPSharding.REPLICATED else tp
            for tp_rank in range(ranks if not shared or ep_rank == 0 else 0):
                for piece in plan.pieces(entry, layout, tp_rank):
                    shape = entry.hf_tensors[piece.name]
                    covered[piece.name] += piece.length * math.prod(shape) // shape[piece.dim]
    assert covered == {name: math.prod(shape) for name, shape in hf_shapes(QWEN3_30B_A3B).items()}
    assert sum(covered.values()) == 30_532_122_624  # the model card's 30.5 billion


def test_families_are_chosen_by_architecture_or_model_type() -> None:
    assert family_of(LlamaConfig(**SIZES)) is LLAMA
    assert family_of(MistralConfig(**SIZES, sliding_window=None)) is LLAMA
    assert family_of(Qwen2Config(**SIZES, architectures=["Qwen2ForCausalLM"])) is QWEN2
    for family, table in FAMILIES_BY_TYPE.items():
        assert family_of(config_of(family)) is table
    assert [table.name for table in FAMILIES_BY_TYPE.values() if table.qkv_bias] == ["qwen2", "qwen2_moe"]
    assert [table.name for table in FAMILIES_BY_TYPE.values() if table.qk_norm] == ["qwen3", "qwen3_moe"]
    assert [table.name for table in FAMILIES_BY_TYPE.values() if table.experts] == ["qwen2_moe", "qwen3_moe"]


FAMILIES_BY_TYPE = {
    "llama": LLAMA, "mistral": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "qwen2_moe": QWEN2_MOE, "qwen3_moe": QWEN3_MOE,
}  # fmt: skip

# The fields of published config.json files that say what the model computes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek-coder-6.7b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 16384, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "tie_word_embeddings": False,
        "vocab_size": 32256,
    },
    "deepseek-math-7b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 30, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 102400,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "is_llama_config": True, "model_type": "llama",
        "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192,
        "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
    },
    "mistral-7b-v0.3": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "qwen2.5-7b-instruct": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen1.5-moe-a2.7b": {
        "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
}  # fmt: skip
PARAMETERS = {
    "deepseek-coder-6.7b": 6_740_512_768, "deepseek-math-7b": 6_910_365_696, "smollm2-135m": 134_515_008,
    "mistral-7b-v0.3": 7_248_023_552, "llama-3.1-8b": 8_030_261_248, "qwen2.5-7b-instruct": 7_615_616_512,
    "qwen3-0.6b": 596_049_920, "qwen1.5-moe-a2.7b": 14_315_784_192, "qwen3-30b-a3b": 30_532_122_624,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_supported(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = load_hf_config(tmp_path)
    assert sum(map(math.prod, hf_shapes(config).values())) == PARAMETERS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert torch.equal(inverse_frequencies(config), _rotary_of(config).inv_freq)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def _rotary_of(config: PretrainedConfig) -> Any:
    """transformers' own rotary module of the model's family."""
    modeling = sys.modules[AutoModelForCausalLM._model_mapping[type(config)].__module__]
    (rotary,) = (value for name, value in vars(modeling).items() if name.endswith("RotaryEmbedding"))
    return rotary(config)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if "rope_type" in config.rope_parameters])
def test_frequencies_and_factor_are_transformers(name: str) -> None:
    theirs = _rotary_of(CONFIGS[name])
    assert torch.equal(inverse_frequencies(CONFIGS[name]), theirs.inv_freq)
    assert attention_factor(CONFIGS[name]) == theirs.attention_scaling
    assert (attention_factor(CONFIGS[name]) != 1) is ("yarn" in name)


_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6}
_PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e6}


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
        (Qwen2Config(rope_parameters=_DYNAMIC), "rope_type='dynamic'"),
        (LlamaConfig(rope_parameters=_PARTIAL), "partial_rotary_factor=0.5"),
        (Qwen3Config(attention_bias=True), "attention_bias=True"),
        (Qwen3Config(use_sliding_window=True, max_window_layers=4), "sliding_window=4096"),
        (config_of("qwen2_moe", qkv_bias=False), "qkv_bias=False"),
        (config_of("qwen2_moe", use_sliding_window=True, sliding_window=32), "sliding_window=32"),
        (config_of("qwen2_moe", decoder_sparse_step=2), "decoder_sparse_step=2"),
        (config_of("qwen3_moe", mlp_only_layers=[0]), "mlp_only_layers=[0]"),
        (config_of("qwen3_moe", num_experts_per_tok=1), "norm_topk_prob=True and num_experts_per_tok=1"),
        (config_of("qwen3_moe", num_experts=0), "num_experts=0"),
        (MixtralConfig(), "'mixtral'"),
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
    tables = {AutoModelForCausalLM._model_mapping[type(config_of(family))].__name__ for family in FAMILIES_BY_TYPE}
    assert set(FAMILIES) == tables
