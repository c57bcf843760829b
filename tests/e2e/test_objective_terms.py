"""Runs of what an objective may have besides a teacher's divergence: rewards alone, a reference, given answers, second
divergences, schedules, prefixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import load_config
from tests.e2e.runs import make_inputs, small_config
from tests.e2e.test_given_answers import _train
from tests.e2e.test_rewards import HYBRID, STOPS
from tests.teacher.test_placements import STUDENTS, _agree
from tests.teacher.test_routing import _run

GRPO = HYBRID | {"objective.lambda_distill": 0, "objective.lambda_rl": 1}
SFT = {"objective.type": "sft", "optimizer.eps": 1e-2}
CASES: dict[str, dict[str, Any]] = {
    "grpo": GRPO,
    "grpo and a reference": GRPO | {"objective.reference_kl": 0.3},
    "hybrid and a reference": HYBRID | {"objective.reference_kl": 0.3},
    "sft": SFT,
    "sft beside": {"objective.sft_coef": 0.5, "data.on_policy_fraction": 0.5, "optimizer.eps": 1e-2},
    "eopd": {"recipe": "eopd", "objective.entropy_threshold": 5.26, "optimizer.eps": 1e-2},
    "exopd": {"recipe": "exopd", "optimizer.eps": 1e-2},
    "iw_opd": {"recipe": "iw_opd", "optimizer.eps": 1e-2},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = make_inputs(tmp_path_factory.mktemp("terms"))
    (Path(found["student.path"]) / "generation_config.json").write_text(STOPS)
    return found


@pytest.fixture(scope="module")
def alone(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case at one rank, when it is first asked for."""
    found: dict[str, Any] = {}

    def run(case: str) -> Any:
        if case not in found:
            found[case] = _run(inputs, tmp_path_factory.mktemp("alone") / "run", 1, **CASES[case])
        return found[case]

    return run  # type: ignore[return-value]


LAYOUTS = [
    ("grpo", "SP2"), ("grpo and a reference", "TP2 PP2"), ("hybrid and a reference", "DP2"), ("sft", "PP2"),
    ("sft beside", "DP2"), ("eopd", "SP2"), ("exopd", "TP2"), ("iw_opd", "TP2"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "student"), LAYOUTS)
def test_a_run_is_the_same_in_every_layout(
    inputs: dict[str, Any], tmp_path: Path, alone: Any, case: str, student: str
) -> None:
    expected = alone(case)
    ranks = 4 if student == "TP2 PP2" else 2
    _agree(_run(inputs, tmp_path / "run", ranks, **CASES[case], **STUDENTS[student]), expected)
    rows = expected[1][1:]
    if case == "eopd":
        assert all(0 < row["forward_share"] < 1 for row in rows), "some tokens have a second divergence, some not"
    if "reference" in case:
        assert rows[0]["reference_kl"] == pytest.approx(0, abs=1e-6), "the student is the reference before any step"
        assert rows[-1]["reference_kl"] > 1e-6


def test_rewards_alone_load_no_teacher(inputs: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    given = inputs | {"teachers.0.path": "/nowhere/at/all"}
    config = small_config(given, tmp_path / "run", **GRPO, steps=2)
    assert config.teachers == []
    rows = _train(config)
    assert "/nowhere/at/all is not loaded" in capsys.readouterr().out
    assert rows[0].keys() >= {"eval/nll"}
    for row in rows:
        assert not any("kl" in name or name.startswith("teacher") for name in row), row
    assert {"reward", "policy_loss", "advantage", "student_entropy", "nll", "mismatch"} <= rows[1].keys()
    kept = load_config(tmp_path / "run")
    assert kept.teachers == []
    assert _train(kept.model_copy(update={"steps": 3}))[-1]["step"] == 3


def test_sft_lowers_the_likelihoods_and_starts_no_engine(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(inputs, tmp_path / "run", **{"objective.type": "sft", "rollout.engine": "vllm"}, steps=12)
    rows = _train(config)
    assert rows[-1]["eval/nll"] < 0.6 * rows[0]["eval/nll"]
    assert rows[1]["loss"] == pytest.approx(rows[1]["nll"])
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


def test_sft_equals_transformers(inputs: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from opd_megatron.trainer import OPDTrainer

    config = small_config(inputs, tmp_path / "run", **SFT, steps=1)
    with OPDTrainer.from_config(config) as trainer:
        rollouts = trainer.rollouts.take(0)
        ids = [[*each.prompt.token_ids, *each.response_ids.tolist()] for each in rollouts]
        starts = [len(each.prompt.token_ids) for each in rollouts]
    [_, row] = _train(config)
    model = AutoModelForCausalLM.from_pretrained(config.student.path, dtype=torch.float64)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for sequence, start in zip(ids, starts, strict=True):
        labels = torch.tensor([[-100] * start + sequence[start:]])
        count = len(sequence) - start
        total = total + model(input_ids=torch.tensor([sequence]), labels=labels).loss.double() * count
        tokens += count
    gradients = torch.autograd.grad(total / tokens, [*model.parameters()])
    assert row["loss"] == pytest.approx(float(total.detach() / tokens), rel=1e-5)
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_schedule_moves_the_weights_and_resumes_where_it_was(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = {name: value for name, value in HYBRID.items() if "lambda" not in name} | {
        "objective.schedules": {"lambda_rl": {0: 0, 4: 1}, "lambda_distill": {0: 1, 2: 0.5}}, "checkpoint.every": 1,
    }  # fmt: skip
    whole = _train(small_config(inputs, tmp_path / "whole", **settings))
    assert [row["lambda_rl"] for row in whole[1:]] == [0, 0.25, 0.5, 0.75]
    assert [row["lambda_distill"] for row in whole[1:]] == [1, 0.75, 0.5, 0.5]
    for row in whole[1:]:
        expected = row["lambda_distill"] * row["divergence"] + row["lambda_rl"] * row["policy_loss"]
        if row["lambda_rl"]:
            assert row["loss"] == pytest.approx(expected + (1 - row["lambda_rl"]) * 0, rel=1e-5)
    _train(small_config(inputs, tmp_path / "cut", **settings, steps=2, **{"optimizer.decay": "constant"}))
    rest = _train(load_config(tmp_path / "cut", ["steps=4"]))
    assert [row["lambda_rl"] for row in rest[1:]] == [0, 0.25, 0.5, 0.75]


def test_prefix_trains_on_few_tokens_and_judges_whole_answers(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = HYBRID | {"objective.prefix_tokens": 2, "steps": 1}
    [_, row] = _train(small_config(inputs, tmp_path / "run", **settings))
    [_, whole] = _train(small_config(inputs, tmp_path / "whole", **HYBRID, steps=1))
    assert row["tokens"] <= 2 * 8 < whole["tokens"]
    assert row["reward"] == whole["reward"]
    assert row["rollout/mean_length"] == whole["rollout/mean_length"]


def test_a_dump_of_a_run_with_a_reference_can_be_resumed(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = GRPO | {"objective.reference_kl": 0.1, "steps": 1}
    _train(small_config(inputs, tmp_path / "run", **settings))
    rows = _train(load_config(tmp_path / "run", ["steps=2"]))
    assert [row["step"] for row in rows] == [0, 1, 2]
    tree = json.loads(json.dumps(load_config(tmp_path / "run").model_dump(mode="json")["teachers"]))
    assert [teacher["name"] for teacher in tree] == ["reference"]
