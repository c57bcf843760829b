"""The shipped configurations of several teachers and of self-distillation, as they stand but for paths and sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config import RunConfig, load_config
from opd_megatron.tasks.sandbox import confinement
from opd_megatron.train import check, run_training
from tests.byte_tokenizer import save_byte_tokenizer
from tests.e2e.runs import make_inputs
from tests.e2e.test_rewards import STOPS
from tests.other_tokenizers import save_bpe_tokenizer
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "steps": 3, "parallel.tensor": 1, "parallel.pipeline": 1, "parallel.data": 1, "parallel.sequence_parallel": False,
    "rollout.engine": "torch", "data.max_prompt_tokens": 80,
    "rollout.prompts_per_step": 8, "rollout.max_new_tokens": 8, "optimizer.warmup_steps": 0,
    "evaluation.every": 3, "evaluation.prompts": 4, "logging.tensorboard": False, "optimizer.lr": 1e-3,
}  # fmt: skip


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    run_training(config, check(config))


def _run(name: str, folder: Path, **overrides: Any) -> list[dict[str, Any]]:
    values = SMALL | {"output_dir": str(folder / "run")} | overrides
    config = load_config(CONFIGS / f"{name}.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()])
    run_ranks(1, _train, config)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("configs")
    found = make_inputs(folder)
    for seed in (11, 12):
        save_tiny(folder / f"t{seed}", head_dim=32, seed=seed, num_hidden_layers=2)
        save_byte_tokenizer(folder / f"t{seed}")
        found[f"teachers.{seed - 10}.path"] = str(folder / f"t{seed}")
    return found


def test_each_task_of_mopd_has_its_teachers(inputs: dict[str, str], tmp_path: Path) -> None:
    source = inputs["data.source"]
    sources = [{"source": source, "task": task, "weight": 1} for task in ("math", "code", "chat")]
    overrides = {key: value for key, value in inputs.items() if key != "data.source"}
    rows = _run("mopd", tmp_path, **overrides, **{"data.sources": sources, "data.eval_source": source})
    for row in rows[1:]:
        tokens = {name: row[f"teacher/{name}/tokens"] for name in ("math", "code", "chat")}
        assert all(tokens.values())
        assert tokens["math"] + tokens["chat"] == row["tokens"], "code is for the coder and the mathematician"
    assert all("eval/forward_kl" in row for row in (rows[0], rows[-1]))


def test_opsd_brings_the_student_near_to_itself_with_the_solution(inputs: dict[str, str], tmp_path: Path) -> None:
    overrides = {"student.path": inputs["student.path"], "data.source": inputs["data.source"]}
    rows = _run("opsd_gsm8k", tmp_path, **overrides, **{"steps": 12, "optimizer.decay": "constant"})
    kl = [row["reverse_kl"] for row in rows[1:]]
    assert sum(kl[-3:]) < 0.9 * sum(kl[:3])


@pytest.mark.parametrize("name", ["opd_gsm8k", "opd_gsm8k_jsd"])
def test_the_sampled_token_algorithms_come_nearer_to_the_teacher(
    inputs: dict[str, str], tmp_path: Path, name: str
) -> None:
    chosen = {key: inputs[key] for key in ("student.path", "teachers.0.path", "data.source")}
    rows = _run(name, tmp_path, **chosen, **{"steps": 12, "optimizer.decay": "constant", "optimizer.min_lr": 0})
    kl = [row["reverse_kl"] for row in rows[1:]]
    assert sum(kl[-3:]) < sum(kl[:3])
    assert all("policy_loss" in row for row in rows[1:])


def test_hybrid_ifeval_is_rewarded_by_its_checkers(inputs: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("if_verifiable")
    rows = [
        {"key": n, "prompt": f"Say {n}.", "instruction_id_list": ["punctuation:no_comma", "keywords:forbidden_words"],
         "kwargs": [{"num_words": None}, {"forbidden_words": ["no"], "num_words": None}]}
        for n in range(40)
    ]  # fmt: skip
    (tmp_path / "ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = tmp_path / "student"
    shutil.copytree(inputs["student.path"], student)
    (student / "generation_config.json").write_text(STOPS)
    models = {"student.path": str(student), "teachers.0.path": inputs["teachers.0.path"]}
    overrides = {"data.source": str(tmp_path / "ifeval.jsonl"), "parallel.micro_batch_size": 8, **models}
    for more in ({}, {"objective.lambda_distill": 0}, {"objective.lambda_rl": 0}):
        found = _run("hybrid_ifeval", tmp_path / str(len(more) + len(str(more))), **overrides, **more)
        assert any(row["reward"] > 0 for row in found[1:])
        assert all(row["reward/errors"] == row["reward/timeouts"] == 0 for row in found[1:])
        assert found[-1]["eval/accuracy"] >= 0
        assert ("reverse_kl" in found[1]) == ("objective.lambda_distill" not in more)
        assert ("policy_loss" in found[1]) == ("objective.lambda_rl" not in more)


@pytest.mark.skipif(confinement()[0] is None, reason="programs cannot be confined here")
def test_gkd_code_answers_mbpp_and_has_programs_judged(inputs: dict[str, str], tmp_path: Path) -> None:
    rows = [
        {"task_id": n, "text": f"Write a function f{n}.", "code": f"def f{n}(): return {n}", "test_setup_code": "",
         "test_list": [f"assert f{n}() == {n}"]}
        for n in range(40)
    ]  # fmt: skip
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {key: inputs[key] for key in ("student.path", "teachers.0.path")}
    settings = {"data.source": str(tmp_path / "mbpp.jsonl"), "data.max_prompt_tokens": 400}
    found = _run("gkd_code", tmp_path, **models, **settings)
    assert found[-1]["eval/accuracy"] == 0, "an untrained model writes no program"
    assert found[1]["loss"] > 0


def test_a_teacher_of_another_tokenizer_scores_spans_of_the_students_text(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    for seed, (name, texts, size) in enumerate((("student", "sums", 350), ("teacher", "words", 420))):
        tokenizer = save_bpe_tokenizer(tmp_path / name, texts, size)
        save_tiny(tmp_path / name, head_dim=32, seed=seed, vocab_size=len(tokenizer) + 6)
    rows = _run("opd_other_tokenizer", tmp_path, **inputs)
    assert all(0.5 < row["teacher/0/aligned"] <= 1 for row in rows[1:])
    assert all("policy_loss" in row for row in rows[1:])
