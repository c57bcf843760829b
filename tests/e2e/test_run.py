"""A whole run: it learns, leaves what the documentation promises, resumes exactly and guards its directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_megatron import cli
from opd_megatron.errors import ConfigError, DataError, MissingPathError, OPDError, TokenizerMismatchError
from opd_megatron.mcore.checkpoint import list_checkpoints
from opd_megatron.metrics import read_metrics
from opd_megatron.trainer import OPDTrainer
from opd_megatron.types import StepMetrics
from tests.byte_tokenizer import save_byte_tokenizer
from tests.e2e.runs import make_inputs, small_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def _train(config: Any) -> None:
    with OPDTrainer.from_config(config) as trainer:
        trainer.train()


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps."""
    folder = tmp_path_factory.mktemp("run") / "out"
    _train(small_config(inputs, folder, **{"steps": 12, "logging.tensorboard": True, "checkpoint.every": 4}))
    return folder


def test_divergence_falls_on_own_samples_and_on_held_out_answers(finished: Path) -> None:
    rows = read_metrics(finished)
    assert rows[-1]["reverse_kl"] < 0.7 * rows[1]["reverse_kl"]
    assert rows[-1]["eval/forward_kl"] < 0.8 * rows[0]["eval/forward_kl"]


def test_metrics_hold_every_documented_key(finished: Path) -> None:
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == list(range(13))
    keys = {
        "step", "loss", "reverse_kl", "forward_kl", "tokens", "policy_version", "grad_norm", "lr", "time/rollout",
        "time/teacher", "time/train", "time/sync", "time/step", "memory/peak", "student_entropy", "teacher_entropy",
        "top1_agreement", "nll", "teacher_nll", "k1", "k2", "k3", "k1_gap",
        "tokens_per_second", "rollout/truncated", "policy_lag", "sync/bytes", "sync/gb_per_second",
    }  # fmt: skip
    for row in rows[1:]:
        assert keys <= set(row)
        assert row["policy_lag"] == 0
        assert row["sync/bytes"] == sum(4 * tensor.numel() for tensor in _weights(finished).values())
        assert row["policy_version"] == row["step"] - 1, "samples come from the weights before the update"
    assert {"eval/forward_kl", "eval/nll"} <= set(rows[0])
    assert ["eval/nll" in row for row in rows[1:]] == [step % 2 == 0 for step in range(1, 13)]


@pytest.mark.parametrize(
    "objective",
    [
        {"objective.type": "on_policy_distill"},
        {"objective.type": "jsd"},
        {
            "objective.type": "jsd", "objective.lambda_coef": 0.7, "objective.truncation": None,
            "objective.clip_low": 0.2, "objective.clip_high": 0.2,
        },
    ],
    ids=["on_policy_distill", "jsd", "of lambda, clipped"],
)  # fmt: skip
def test_a_sampled_token_form_closes_the_gap_it_stands_for(
    inputs: dict[str, str], tmp_path: Path, objective: dict[str, Any]
) -> None:
    settings = {
        "steps": 12, "checkpoint.every": 0, "checkpoint.export_hf": False, "rollout.samples_per_prompt": 4,
        "objective.temperature": 0.8, "rollout.temperature": 0.8,
    }  # fmt: skip
    _train(small_config(inputs, tmp_path / "run", **settings, **objective))
    rows = read_metrics(tmp_path / "run")
    for row in rows[1:]:
        # The plain engine computes what the trainer computes: a shifted token or another temperature would show.
        assert row["ratio"] == pytest.approx(1, abs=1e-4)
        assert row["clip_fraction"] == 0
        assert row["k1"] == pytest.approx(row["reverse_kl"] + row["k1_gap"], abs=1e-6)
    assert rows[-1]["divergence"] < 0.6 * rows[1]["divergence"]
    assert rows[-1]["reverse_kl"] < 0.6 * rows[1]["reverse_kl"]
    assert rows[-1]["eval/forward_kl"] < 0.8 * rows[0]["eval/forward_kl"]


def test_run_directory_holds_what_the_documentation_promises(finished: Path) -> None:
    assert yaml.safe_load((finished / "config.yaml").read_text())["steps"] == 12
    assert [step for step, _ in list_checkpoints(finished / "checkpoints")] == [8, 12]
    assert (finished / "report" / "curves.png").stat().st_size > 10_000
    assert list((finished / "tensorboard").glob("events.*"))


def test_exported_student_loads_in_transformers_and_is_the_trained_one(finished: Path, inputs: dict[str, str]) -> None:
    student = AutoModelForCausalLM.from_pretrained(finished / "hf")
    assert AutoTokenizer.from_pretrained(finished / "hf")("ab").input_ids == [97, 98]
    before = AutoModelForCausalLM.from_pretrained(inputs["student.path"])
    changed = [not torch.equal(a, b) for a, b in zip(student.parameters(), before.parameters(), strict=True)]
    assert all(changed)
    row = read_metrics(finished)[-1]
    assert _held_out_nll(student, finished) == pytest.approx(row["eval/nll"], rel=1e-4)


def _held_out_nll(student: Any, run: Path) -> float:
    """NLL of the held-out answers in plain transformers, from the run's own prompts."""
    from opd_megatron.config import build_config
    from opd_megatron.data.prompts import build_train_and_eval
    from opd_megatron.data.tokenizer import load_tokenizer

    config = build_config(yaml.safe_load((run / "config.yaml").read_text()))
    _, prompts = build_train_and_eval(config, load_tokenizer(config.student.path))
    total, tokens = 0.0, 0
    for prompt in prompts:
        assert prompt.answer_ids is not None
        ids = torch.tensor([[*prompt.token_ids, *prompt.answer_ids]])
        logprobs = student(ids).logits.log_softmax(-1)[0, len(prompt.token_ids) - 1 : -1]
        total -= logprobs.gather(-1, torch.tensor(prompt.answer_ids)[:, None]).sum().item()
        tokens += len(prompt.answer_ids)
    return total / tokens


def test_interrupted_run_resumes_to_bit_identical_weights_and_one_row_a_step(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 5, "checkpoint.every": 2}
    _train(small_config(inputs, tmp_path / "whole", **settings))

    original, calls = OPDTrainer.step, iter(range(100))

    def step_that_is_cut_off(self: OPDTrainer) -> StepMetrics:
        if next(calls) == 3:  # after the checkpoint of step 2 and the row of step 3
            raise KeyboardInterrupt
        return original(self)

    config = small_config(inputs, tmp_path / "cut", **settings)
    monkeypatch.setattr(OPDTrainer, "step", step_that_is_cut_off)
    with pytest.raises(KeyboardInterrupt):
        _train(config)
    assert [row["step"] for row in read_metrics(tmp_path / "cut")] == [0, 1, 2, 3]
    monkeypatch.undo()
    _train(config)

    whole, cut = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    rows = [read_metrics(tmp_path / name) for name in ("whole", "cut")]
    for a, b in zip(*rows, strict=True):
        assert (a["step"], a.get("loss"), a.get("eval/nll")) == (b["step"], b.get("loss"), b.get("eval/nll"))


def test_a_finished_run_is_reported_again_without_training(finished: Path, inputs: dict[str, str]) -> None:
    before = (finished / "metrics.jsonl").read_text()
    _train(small_config(inputs, finished, **{"steps": 12, "checkpoint.every": 4}))
    assert (finished / "metrics.jsonl").read_text() == before


def test_evaluate_and_export_use_the_newest_checkpoint(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = _weights(finished)
    assert cli.main(["evaluate", str(finished)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("eval/"))
    row = read_metrics(finished)[-1]
    assert {name: float(value) for name, value in printed.items()} == {
        name: round(value, 4) for name, value in row.items() if name.startswith("eval/")
    }
    shutil.rmtree(finished / "hf")
    assert cli.main(["export", str(finished)]) == 0
    again = _weights(finished)
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())


def test_another_run_in_the_same_directory_is_refused(finished: Path, inputs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"belongs to a run with objective.type='reverse_kl', this one has 'gkd'"):
        OPDTrainer.from_config(small_config(inputs, finished, **{"objective.type": "gkd"}))
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ConfigError, match="not empty"):
        OPDTrainer.from_config(small_config(inputs, tmp_path))


def test_different_tokenizers_are_refused_before_models_are_built(inputs: dict[str, str], tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    other = tmp_path / "teacher"
    other.mkdir()
    for file in Path(inputs["teachers.0.path"]).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    save_byte_tokenizer(other)
    data = json.loads((other / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(data))
    assert PreTrainedTokenizerFast.from_pretrained(other)("a").input_ids == [98]
    config = small_config({**inputs, "teachers.0.path": str(other)}, tmp_path / "run")
    with pytest.raises(TokenizerMismatchError) as caught:
        OPDTrainer.from_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "overrides", "error", "part"),
    [
        ("", {}, DataError, "prompts.jsonl"),
        ('{"text": "hi"}\n', {}, DataError, "question"),
        (None, {}, MissingPathError, "prompts.jsonl"),
        (
            '{"question": "' + "x" * 200 + '", "answer": "y"}\n{"question": "a", "answer": "b"}\n',
            {},
            DataError,
            "max_prompt_tokens=80",
        ),
    ],
)
def test_bad_data_is_one_line_naming_file_row_or_limit(
    inputs: dict[str, str], tmp_path: Path, content: str | None, overrides: Any, error: type[OPDError], part: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error) as caught:
        OPDTrainer.from_config(small_config({**inputs, "data.source": str(path)}, tmp_path / "run", **overrides))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "a run that never began leaves no directory"
