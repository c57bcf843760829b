"""Models as users have them: ids without rows, heads of their own, short contexts, NaN, old spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_megatron import cli
from opd_megatron.run.agreement import reference_nll
from opd_megatron.weights.hf_reader import load_hf_config
from tests.byte_tokenizer import CHAT_TEMPLATE
from tests.cases.inputs import edit_json, make_pair, refused, train_words


def agree(*overrides: str) -> tuple[str, ...]:
    return ("evaluation.agreement=true", *overrides)


def add_tokens(folder: Path, tokens: list[str], template: str) -> None:
    """Gives the tokenizer special tokens that the model has no rows for, and a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def add_turn_tokens(folder: Path) -> None:
    """A template with two tokens more than the model has rows."""
    template = CHAT_TEMPLATE.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|over|>")
    add_tokens(folder, ["<|turn|>", "<|over|>"], template)


@pytest.mark.parametrize(
    "rows", [(272, 272), (304, 272), (272, 304)], ids=["both short", "teacher short", "student short"]
)
@pytest.mark.parametrize("command", ["train", "evaluate", "data"])
def test_an_id_without_a_row_is_one_line_before_anything_starts(
    tmp_path: Path, rows: tuple[int, int], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path, student={"vocab_size": rows[0]}, teacher={"vocab_size": rows[1]})
    for name in ("student", "teacher"):
        add_turn_tokens(tmp_path / name)
    line = refused(capsys, command, *train_words(tmp_path)[1:])
    assert "token id 273 ('<|over|>'), which occurs in the stop list" in line
    assert f"of {'student' if rows[0] == 272 else 'teacher'} " in line
    assert not (tmp_path / "run").exists()


def test_a_template_that_writes_an_id_without_a_row_is_named_by_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path)
    for name in ("student", "teacher"):
        add_tokens(tmp_path / name, ["<|turn|>"], "<|turn|>" + CHAT_TEMPLATE)
    assert "token id 272 ('<|turn|>'), which occurs in the prompt 'prompts:0'" in refused(
        capsys, *train_words(tmp_path)
    )


def test_a_text_that_holds_an_id_without_a_row_is_named_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path)
    for name in ("student", "teacher"):
        add_tokens(tmp_path / name, ["<|tool|>"], CHAT_TEMPLATE)
    assert cli.main(train_words(tmp_path, "steps=1")) == 0, "a token that occurs nowhere does not matter"
    rows = (tmp_path / "prompts.jsonl").read_text().splitlines()
    rows[3] = json.dumps({"question": "q", "answer": "use <|tool|>"})
    (tmp_path / "other.jsonl").write_text("\n".join(rows) + "\n")
    words = train_words(tmp_path, f"data.source={tmp_path / 'other.jsonl'}", f"output_dir={tmp_path / 'other'}")
    assert "the gold answer of prompt 'other:3'" in refused(capsys, *words)


@pytest.mark.parametrize(("student", "teacher"), [(304, 272), (272, 304), (304, 304)])
def test_only_ids_that_the_tokenizer_knows_and_all_models_have_are_sampled(
    tmp_path: Path, student: int, teacher: int
) -> None:
    make_pair(tmp_path, student={"vocab_size": student}, teacher={"vocab_size": teacher})
    from opd_megatron.config import load_config
    from opd_megatron.trainer import OPDTrainer

    config = load_config(None, [*train_words(tmp_path)[1:], *agree("rollout.max_new_tokens=32")])
    sampled: list[int] = []
    with OPDTrainer.from_config(config) as trainer:
        sample = trainer.rollout_client.sample

        def noted(*arguments: Any) -> Any:
            rollouts = sample(*arguments)
            sampled.extend(token for rollout in rollouts for token in rollout.response_ids.tolist())
            return rollouts

        trainer.rollout_client.sample = noted  # type: ignore[method-assign]
        trainer.train()
    assert len(sampled) > 100
    assert max(sampled) < 272


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_tied_or_not_is_decided_by_the_file(
    tmp_path: Path, who: str, tensor: int, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path, **{who: {"tie_word_embeddings": False}})
    edit_json(tmp_path / who / "config.json", tie_word_embeddings=True)
    assert load_hf_config(tmp_path / who).tie_word_embeddings is False
    if tensor == 1:
        assert cli.main(train_words(tmp_path, *agree("optimizer.lr=1e-9"))) == 0
        assert "not compared with transformers" not in capsys.readouterr().out
        exported = load_file(tmp_path / "run/hf/model.safetensors")
        assert ("lm_head.weight" in exported) == (who == "student")
        own = json.loads((tmp_path / "run/hf/config.json").read_text())
        assert own["tie_word_embeddings"] is (who != "student")
    else:
        megatron = str(tmp_path / "megatron")
        assert cli.main(["convert", "hf-to-megatron", "--hf", str(tmp_path / who), "--out", megatron]) == 0
        back = ["--megatron", megatron, "--out", str(tmp_path / "back")]
        assert cli.main(["convert", "megatron-to-hf", *back]) == 0
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in (who, "back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_surplus_head_that_is_the_embedding_stays_tied(tmp_path: Path) -> None:
    make_pair(tmp_path)
    file = tmp_path / "student/model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert load_hf_config(tmp_path / "student").tie_word_embeddings is True
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, file, {"format": "pt"})  # tied the other way round
    assert cli.main(train_words(tmp_path, *agree())) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_layer_by_layer_is_the_whole_model(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pair(tmp_path, family)
    ids = list(b"What is 1 plus 2? It is 3.")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([[-100] * 18 + ids[18:]])).loss
    whole = reference_nll(tmp_path / "student", ids, len(ids) - 18)
    monkeypatch.setattr("opd_megatron.run.agreement._free_bytes", lambda: 0.0)
    by_layers = reference_nll(tmp_path / "student", ids, len(ids) - 18)
    assert whole == pytest.approx(float(loss), abs=1e-5)
    assert by_layers == pytest.approx(whole, abs=1e-5)


def test_a_model_that_is_read_otherwise_than_transformers_reads_it_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path, "qwen2")
    monkeypatch.setattr("opd_megatron.mcore.model.inverse_frequencies", lambda config: torch.ones(8) * 0.3)
    line = refused(capsys, *train_words(tmp_path, *agree()))
    assert "nats a token in Megatron and" in line
    assert "evaluation.agreement=false" in line
    assert not (tmp_path / "run/metrics.jsonl").read_text()


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_name_their_model(
    tmp_path: Path, who: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path)
    file = tmp_path / who / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"].view(-1)[0] = value
    save_file(weights, file, metadata={"format": "pt"})
    for extra in (agree(), ("evaluation.agreement=false",)):
        line = refused(capsys, *train_words(tmp_path, *extra))
        assert who in line
        assert "NaN or infinite" in line
    words = train_words(tmp_path, f"output_dir={tmp_path / 'none'}")[1:]
    assert who in refused(capsys, "evaluate", *words, "--checkpoint", "initial")


def test_a_teachers_context_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pair(tmp_path, teacher={"max_position_embeddings": 48})
    line = refused(capsys, *train_words(tmp_path))
    assert "must not exceed the context of teacher" in line
    assert "48 tokens" in line


@pytest.mark.parametrize("theta", [1e6, 12345.0])
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_the_exported_config_is_read_rightly_by_old_and_new_readers(
    tmp_path: Path, theta: float, spelling: str
) -> None:
    make_pair(tmp_path, "qwen2")
    file = tmp_path / "student/config.json"
    tree = json.loads(file.read_text())
    tree.pop("rope_parameters", None)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    file.write_text(json.dumps(tree | ({"rope_theta": theta} if spelling == "old" else rope) | {"my_own": 3}))
    assert cli.main(train_words(tmp_path, *agree("steps=1"))) == 0
    exported = json.loads((tmp_path / "run/hf/config.json").read_text())
    assert exported["rope_theta"] == theta
    assert exported["torch_dtype"] == exported["dtype"] == "float32"
    assert exported["my_own"] == 3, "what the student's config said is kept"
    assert load_hf_config(tmp_path / "run/hf").rope_parameters["rope_theta"] == theta


def test_the_export_stops_where_training_stopped_and_keeps_every_template(tmp_path: Path) -> None:
    make_pair(tmp_path)
    for name in ("student", "teacher"):
        edit_json(tmp_path / name / "config.json", eos_token_id=256)
    (tmp_path / "student/generation_config.json").write_text('{"eos_token_id": 256, "temperature": 0.6}')
    templates = tmp_path / "student/additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    assert cli.main(train_words(tmp_path, "steps=1")) == 0
    written = json.loads((tmp_path / "run/hf/generation_config.json").read_text())
    assert written == {"eos_token_id": [256, 258], "temperature": 0.6}
    assert (tmp_path / "run/hf/additional_chat_templates/tool_use.jinja").read_text() == "{{ messages }}"
    assert cli.main(train_words(tmp_path, "steps=2")) == 0, "an export is replaced"


def test_other_formats_beside_the_weights_are_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    from opd_megatron.weights.hf_reader import resolve_model

    listing = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "chat_template.jinja", "additional_chat_templates/tool.jinja", "tokenizer.model", "generation_config.json",
        "consolidated.safetensors", "consolidated.00.safetensors", "adapter/adapter_model.safetensors",
        "adapter_model.safetensors", "mlx/model.safetensors", "original/params.json", "original/consolidated.00.pth",
        "pytorch_model.bin", "onnx/config.json", "README.md",
    ]  # fmt: skip
    kept: list[str] = []

    def fake(path: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        kept.extend(filter_repo_objects(listing, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    resolve_model("org/model")
    assert kept == listing[:8]
