from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto import AutoModelForCausalLM

from opd_megatron.errors import WeightsError
from opd_megatron.weights.hf_reader import load_hf_config
from opd_megatron.weights.save import save_hf
from tests.weights.checkpoints import CONFIGS


def _buckets(folder: Path, dtype: torch.dtype = torch.float32):
    for name, tensor in load_file(folder / "model.safetensors").items():
        yield [(name, tensor.to(dtype))]


@pytest.mark.parametrize("max_shard_bytes", [2**30, 60_000, 10_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_an_export_and_computes_the_same_logits(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, max_shard_bytes: int
) -> None:
    source = checkpoints[name]
    out = save_hf(
        _buckets(source), load_hf_config(source), tmp_path / "hf", dtype=torch.float32, max_shard_bytes=max_shard_bytes
    )
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes < 2**30) == (out / "model.safetensors.index.json").exists()
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.tie_word_embeddings == CONFIGS[name].tie_word_embeddings
    expected = torch.load(source / "expected.pt")
    with torch.no_grad():
        assert torch.equal(model(expected["tokens"]).logits, expected["logits"])


def test_the_config_names_the_dtype_and_class_of_the_export(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoints["llama_tied"]
    config = load_hf_config(source)
    out = save_hf(_buckets(source), config, tmp_path / "hf", dtype=torch.bfloat16)
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["tie_word_embeddings"] is True
    assert config.dtype == torch.float32, "the caller's config is left as it was"
    tensors = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_tokenizer_and_generation_files_come_along(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source, tokenizer = checkpoints["llama_tied"], tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "notes.md", "model.safetensors"):
        (tokenizer / name).write_text("{}")
    out = save_hf(
        _buckets(source), load_hf_config(source), tmp_path / "hf", tokenizer_dir=tokenizer, dtype=torch.float32
    )
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja",
    }  # fmt: skip


def test_a_failed_export_leaves_the_earlier_one_and_nothing_else(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoints["llama_tied"]
    config = load_hf_config(source)
    out = save_hf(_buckets(source), config, tmp_path / "hf", dtype=torch.float32)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def breaking():
        yield from list(_buckets(source))[:3]
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        save_hf(breaking(), config, out, dtype=torch.bfloat16)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_new_export_replaces_the_earlier_one(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoints["llama_tied"]
    config = load_hf_config(source)
    save_hf(_buckets(source), config, tmp_path / "hf", dtype=torch.float32, max_shard_bytes=20_000)
    out = save_hf(_buckets(source), config, tmp_path / "hf", dtype=torch.bfloat16)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_of_other_files_is_never_replaced(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    source = checkpoints["llama_tied"]
    with pytest.raises(WeightsError, match=r"holds 'thesis.tex', which is no export's: choose another"):
        save_hf(_buckets(source), load_hf_config(source), tmp_path, dtype=torch.float32)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(WeightsError, match=r"cannot write ./proc"):
        save_hf(_buckets(source), load_hf_config(source), "/proc/hf", dtype=torch.float32)
