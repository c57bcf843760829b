import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from opd_megatron.convert.prune import kept_layers, prune_depth
from opd_megatron.errors import MissingPathError, UnsupportedModelError, WeightsError
from tests.byte_tokenizer import save_byte_tokenizer
from tests.tools.scripts import load_script

SIZES = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(("total", "keep"), [(30, 24), (30, 2), (30, 30), (7, 5), (4, 3), (80, 41)])
def test_kept_layers_are_even_and_hold_first_and_last(total, keep):
    kept = kept_layers(total, keep)
    assert len(set(kept)) == keep
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (0, total - 1)
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert gaps <= {math.floor((total - 1) / (keep - 1)), math.ceil((total - 1) / (keep - 1))}


@pytest.mark.parametrize("keep", [0, 1, 9, -2])
def test_impossible_layer_counts_are_refused(keep):
    with pytest.raises(WeightsError, match=f"keep {keep} of 8 layers: give a number from 2 to 8"):
        kept_layers(8, keep)


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_the_student_computes_what_the_teacher_computes_with_the_other_layers_taken_out(tmp_path, shard_size):
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(num_hidden_layers=5, tie_word_embeddings=True, **SIZES)).eval()
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size=shard_size)
    save_byte_tokenizer(tmp_path / "teacher")
    prune_depth(tmp_path / "teacher", 3, tmp_path / "student")
    student = LlamaForCausalLM.from_pretrained(tmp_path / "student").eval()
    teacher.model.layers = torch.nn.ModuleList(teacher.model.layers[i] for i in (0, 2, 4))
    teacher.config.num_hidden_layers = 3
    ids = torch.randint(0, 272, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids, use_cache=False).logits)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "student").encode("ab") == [97, 98]


def test_layer_types_of_the_config_follow_the_kept_layers_and_the_weights_keep_their_type(tmp_path):
    config = Qwen2Config(num_hidden_layers=4, tie_word_embeddings=False, **SIZES)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    tree = json.loads((tmp_path / "teacher/config.json").read_text())
    tree["layer_types"] = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    (tmp_path / "teacher/config.json").write_text(json.dumps(tree))
    out = prune_depth(tmp_path / "teacher", 2, tmp_path / "student")
    pruned = json.loads((out / "config.json").read_text())
    assert (pruned["num_hidden_layers"], pruned["layer_types"]) == (2, ["full_attention"] * 2)
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "conversion.json").read_text())["kept_layers"] == [0, 3]


def test_missing_and_damaged_sources_are_refused_and_leave_nothing(tmp_path, capsys):
    with pytest.raises(MissingPathError, match=r"no config\.json"):
        prune_depth(tmp_path / "none", 2, tmp_path / "out")
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **SIZES)).save_pretrained(tmp_path / "t")
    tree = json.loads((tmp_path / "t/config.json").read_text())
    (tmp_path / "t/config.json").write_text(json.dumps(tree | {"num_hidden_layers": 4}))
    with pytest.raises(UnsupportedModelError, match="holds 3 layers named"):
        prune_depth(tmp_path / "t", 2, tmp_path / "out")
    weights = (tmp_path / "t/model.safetensors").read_bytes()
    (tmp_path / "t/model.safetensors").write_bytes(weights[: len(weights) // 2])
    main = load_script("checkpoint_convert/prune_depth.py").main
    assert main(["--hf", str(tmp_path / "t"), "--layers", "2", "--out", str(tmp_path / "out")]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
