"""GGUF (llama architecture) to a Hugging Face folder.

llama.cpp stores query and key projections with the rows of each head reordered for its own rotary embedding
(pairs interleaved instead of split in halves); `_unpermute` restores the order that Hugging Face expects. A
quantised file gives the dequantised weights: the quantisation error stays.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader
from transformers import GenerationConfig, LlamaConfig

from opd_megatron.convert.gguf_tokenizer import build_tokenizer
from opd_megatron.errors import MissingPathError, UnsupportedModelError, WeightsError
from opd_megatron.system.atomic import new_folder
from opd_megatron.types import DTYPES
from opd_megatron.weights.safetensors_writer import PROVENANCE, file_sha256, write_safetensors

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(source: str | Path, out: str | Path, *, dtype: str = "bf16", progress: bool = False) -> Path:
    """Writes config.json, safetensors, tokenizer and generation_config.json of `source` into the new folder `out`.

    Raises:
        MissingPathError: no such file.
        WeightsError: not a readable GGUF file, a tensor is missing, or `out` is not empty.
        UnsupportedModelError: another architecture, tokenizer or rotary scaling than this converter knows.
    """
    source, out = Path(source), Path(out)
    reader = open_gguf(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {hf_name(tensor.name): tensor for tensor in reader.tensors}
    config = hf_config(fields, tied="lm_head.weight" not in tensors)
    config.dtype = DTYPES[dtype]
    _check_complete(tensors, config.num_hidden_layers, source)
    tokenizer = build_tokenizer(fields)
    with new_folder(out, WeightsError) as folder:
        shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
        write_safetensors(
            folder, shapes, lambda name: hf_tensor(name, tensors[name], config), DTYPES[dtype], progress=progress
        )
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_old_names(folder, config)
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        ).save_pretrained(folder)
        provenance = {"tool": "gguf_to_hf", "source": source.name, "sha256": file_sha256(source), "dtype": dtype}
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    return out


def open_gguf(source: Path) -> GGUFReader:
    """Maps the file. Raises MissingPathError or WeightsError."""
    if not source.is_file():
        raise MissingPathError(f"GGUF file {str(source)!r} does not exist: give the path of a .gguf file")
    try:
        return GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise WeightsError(f"{str(source)!r} is not a readable GGUF file ({error}): fetch it again") from None


def hf_name(name: str) -> str:
    """Translates a GGUF tensor's name to Hugging Face's. Raises UnsupportedModelError."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    module, _, kind = rest.partition(".")
    if block != "blk" or module not in LAYER_NAMES or kind not in ("weight", "bias"):
        raise UnsupportedModelError(
            f"GGUF tensor {name!r} has no place in a Llama model: this converter knows plain llama files only"
        )
    return f"model.layers.{layer}.{LAYER_NAMES[module]}.{kind}"


def hf_config(fields: dict[str, Any], *, tied: bool) -> LlamaConfig:
    """Builds the model's config from GGUF metadata. Raises UnsupportedModelError, WeightsError."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModelError(f"GGUF architecture {architecture!r} is not supported: only 'llama' files convert")
    refused = [key for key in fields if key.startswith(("llama.rope.scaling", "llama.expert_"))]
    if refused:
        raise UnsupportedModelError(f"GGUF field {refused[0]!r} is not supported: only plain rotary dense llama files")
    try:
        heads = int(fields["llama.attention.head_count"])
        hidden = int(fields["llama.embedding_length"])
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=len(fields["tokenizer.ggml.tokens"]),
            hidden_size=hidden,
            intermediate_size=int(fields["llama.feed_forward_length"]),
            num_hidden_layers=int(fields["llama.block_count"]),
            num_attention_heads=heads,
            num_key_value_heads=int(fields.get("llama.attention.head_count_kv", heads)),
            head_dim=int(fields.get("llama.attention.key_length", hidden // heads)),
            max_position_embeddings=int(fields["llama.context_length"]),
            rms_norm_eps=round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 10),
            rope_parameters={"rope_type": "default", "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0))},
            tie_word_embeddings=tied,
            bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
            pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
        )
    except KeyError as error:
        raise WeightsError(f"the GGUF file lacks the field {error}: it is damaged or not a language model") from None


def hf_tensor(name: str, tensor: Any, config: LlamaConfig) -> torch.Tensor:
    """Dequantises a GGUF tensor to fp32 in Hugging Face's row order."""
    values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(_shape(tensor))
    if ".q_proj." in name:
        values = _unpermute(values, config.num_attention_heads)
    elif ".k_proj." in name:
        values = _unpermute(values, config.num_key_value_heads)
    return torch.from_numpy(np.ascontiguousarray(values))


def _write_old_names(folder: Path, config: LlamaConfig) -> None:
    """Adds the names that readers before transformers 5 look for; without them they take another rotary base."""
    for filename, entry in (
        ("config.json", {"rope_theta": config.rope_parameters["rope_theta"]}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        path = folder / filename
        tree = json.loads(path.read_text()) | entry
        path.write_text(json.dumps(tree, indent=2) + "\n")


def _shape(tensor: Any) -> tuple[int, ...]:
    # GGUF lists the fastest-varying dimension first.
    return tuple(int(size) for size in reversed(tensor.shape))


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorders [heads * d, ...] from interleaved rotary pairs to halves: each head's first halves come first."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _check_complete(tensors: dict[str, Any], layers: int, source: Path) -> None:
    wanted = {"model.embed_tokens.weight", "model.norm.weight"}
    wanted |= {f"model.layers.{i}.{module}.weight" for i in range(layers) for module in LAYER_NAMES.values()}
    missing = sorted(wanted - tensors.keys())
    if missing:
        raise WeightsError(f"{str(source)!r} lacks {len(missing)} tensors, first {missing[0]!r}: fetch the file again")
    biases = [name for name in tensors if name.endswith(".bias")]
    if biases:
        raise UnsupportedModelError(f"GGUF file {str(source)!r} has biases ({biases[0]!r}): only bias-free llama files")
    surplus = sorted(tensors.keys() - wanted - {"lm_head.weight"})
    if surplus:
        raise WeightsError(f"{str(source)!r} has tensors beyond its {layers} layers, first {surplus[0]!r}")
