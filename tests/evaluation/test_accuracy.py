"""Answers that are judged, in training and by the command: real runs with tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.cli import main
from opd_megatron.config import dump_config, load_config
from opd_megatron.errors import ConfigError
from opd_megatron.evaluation import from_json
from tests.e2e.runs import make_inputs, small_config
from tests.e2e.test_given_answers import _train
from tests.e2e.test_rewards import OF, _even
from tests.ranks import run_ranks
from tests.teacher.test_placements import STUDENTS

TASK = OF + "even"
STOPS = json.dumps({"eos_token_id": [256, 258, *(byte for byte in range(256) if byte % 5)]})
"""Of a generation_config.json: greedy answers of untrained models end soon, but not at once."""
JUDGED = {"evaluation.task": TASK, "evaluation.task_prompts": 6, "evaluation.samples": 3, "steps": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = make_inputs(tmp_path_factory.mktemp("accuracy"))
    for model in ("student.path", "teachers.0.path"):
        (Path(found[model]) / "generation_config.json").write_text(STOPS)
    return found


@pytest.fixture(scope="module")
def run(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("accuracy") / "run"
    return folder, _train(small_config(inputs, folder, **JUDGED, **{"checkpoint.every": 1}))


def test_training_reports_accuracy_at_every_evaluation(run: tuple[Path, list[dict[str, Any]]]) -> None:
    _, rows = run
    names = {"eval/accuracy", "eval/avg@3", "eval/pass@1", "eval/pass@2", "eval/pass@3", "eval/truncated"}
    assert [row["step"] for row in rows if names <= row.keys()] == [0, 2, 3]
    assert len({row.get("eval/accuracy") for row in rows}) > 2, "some answers are better than others"
    for row in rows:
        if "eval/accuracy" in row:
            assert 0 <= row["eval/pass@1"] <= row["eval/pass@2"] <= row["eval/pass@3"] <= 1
        assert "reward" not in row, "nothing but evaluation is judged"


def test_answers_are_greedy_and_judged_as_they_are(inputs: dict[str, Any], run: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from opd_megatron.trainer import OPDTrainer

    config = small_config(inputs, tmp_path / "run", **JUDGED)
    with OPDTrainer.from_config(config) as trainer:
        assert trainer.accuracy is not None
        prompts, tokenizer = trainer.accuracy.prompts, trainer.tokenizer
        stops = trainer.stop_token_ids
    model = AutoModelForCausalLM.from_pretrained(config.student.path, dtype=torch.float32)
    total = 0.0
    for prompt in prompts:
        ids = list(prompt.token_ids)
        answer: list[int] = []
        while len(answer) < 8 and not (answer and answer[-1] in stops):
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        text = tokenizer.decode(answer, skip_special_tokens=True)
        total += _even(text) if answer[-1] in stops else 0.0
    assert run[1][0]["eval/accuracy"] == pytest.approx(total / len(prompts))


def test_the_command_finds_what_training_found_and_compares(
    run: tuple[Path, list[dict[str, Any]]], capsys: Any, tmp_path: Path
) -> None:
    folder, rows = run
    words = [
        "evaluate",
        str(folder),
        "--task",
        TASK,
        "--n",
        "6",
        "--samples",
        "3",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main([*words, "--compare", "initial", "--compare", "teacher"]) == 0
    out = capsys.readouterr().out
    student, initial, teacher = from_json((tmp_path / "out.json").read_text())
    assert (student.model, initial.model) == ("student at step 3", "student at step 0")
    assert teacher.model.endswith("teacher")
    for result, row in ((student, rows[-1]), (initial, rows[0])):
        for name, estimate in result.estimates().items():
            assert estimate.value == pytest.approx(row[f"eval/{name}"]), (result.model, name)
    assert [score.id for score in teacher.scores] == [score.id for score in student.scores]
    kept = list((folder / "evaluation").glob("*-step-3.json"))
    assert len(kept) == 1
    assert json.loads(kept[0].read_text())[0]["estimates"]["accuracy"].keys() == {"value", "low", "high"}
    assert "95% intervals" in out
    assert "student at step 0" in out


def test_a_model_that_is_no_runs_is_evaluated_by_its_folder(
    inputs: dict[str, Any], run: Any, capsys: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    words = ["evaluate", inputs["student.path"], "--task", TASK, "--data", inputs["data.source"], "--n", "5"]
    settings = ["rollout.engine=torch", "student.dtype=fp32", "rollout.max_new_tokens=8"]
    assert main([*words, "--json", str(out), *settings]) == 0
    (result,) = from_json(out.read_text())
    assert result.step is None
    assert len(result.scores) == 5
    assert set(result.estimates()) == {"accuracy"}
    assert main(["evaluate", inputs["student.path"], "--task", TASK, *settings]) == 2
    assert "has no data of its own: name some with --data" in capsys.readouterr().err


def _measure(rank: int, world_size: int, config: Any) -> dict[str, float]:
    from opd_megatron.trainer import OPDTrainer

    with OPDTrainer.from_config(config, sampling=False, scoring=False, answering=True) as trainer:
        return trainer.answers("it", 0).metrics()


@pytest.mark.parametrize("student", ["TP2", "DP2"])
def test_it_is_the_same_in_every_layout(inputs: dict[str, Any], tmp_path: Path, run: Any, student: str) -> None:
    config = small_config(inputs, tmp_path / "run", **JUDGED, **STUDENTS[student])
    for found in run_ranks(2, _measure, config):
        for name, value in found.items():
            assert value == pytest.approx(run[1][0][name]), name


def test_a_command_of_several_ranks_compares_models_too(run: Any, tmp_path: Path) -> None:
    """Each model is a job of its own, one after the other on the same ranks."""
    folder, rows = run
    words = ["evaluate", str(folder), "--task", TASK, "--n", "6", "--samples", "3", "--json"]
    words += [
        str(tmp_path / "out.json"),
        "--compare",
        "initial",
        "--compare",
        "teacher",
        "parallel.tensor=2",
        "parallel.data=1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "opd_megatron.cli", *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    results = from_json((tmp_path / "out.json").read_text())
    assert [result.step for result in results] == [3, 0, None]
    for result, row in zip(results, (rows[-1], rows[0]), strict=False):
        assert result.estimates()["accuracy"].value == pytest.approx(row["eval/accuracy"])


def test_the_best_checkpoint_may_be_the_most_accurate(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = JUDGED | {"checkpoint.best_metric": "eval/accuracy", "checkpoint.every": 1, "evaluation.every": 3}
    rows = _train(small_config(inputs, tmp_path / "run", **settings))
    assert all("eval/accuracy" in row for row in rows)
    best = max(rows[1:], key=lambda row: row["eval/accuracy"])
    kept = (tmp_path / "run" / "checkpoints" / "best").read_text().strip()
    assert int(kept.rpartition("_")[2]) == best["step"], [row["eval/accuracy"] for row in rows]


def test_sft_is_evaluated_by_answers_too(inputs: dict[str, Any], tmp_path: Path) -> None:
    rows = _train(small_config(inputs, tmp_path / "run", **JUDGED, **{"objective.type": "sft"}))
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 3]
    folder = tmp_path / "run"
    assert main(["evaluate", str(folder), "--task", TASK, "--n", "6", "--samples", "3"]) == 0
    (path,) = (folder / "evaluation").iterdir()
    (found,) = from_json(path.read_text())
    assert found.estimates()["accuracy"].value == pytest.approx(rows[-1]["eval/accuracy"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "2"], "--samples needs --task"),
        (["--task", "gsm9k"], "unknown task 'gsm9k': did you mean 'gsm8k'"),
        (["--task", TASK, "--n", "0"], "--n 0 must be at least 1"),
        (["--task", TASK, "--samples", "2", "--k", "4"], "pass@k needs k samples or more"),
        (["--task", TASK, "--sample", "2"], "did you mean '--samples'"),
        (["--task", TASK, "--checkpoint", "99"], "99"),
        (["--task", TASK, "output_dir=elsewhere"], "output_dir='elsewhere' is another run than"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_line(run: Any, capsys: Any, words: list[str], message: str) -> None:
    assert main(["evaluate", str(run[0]), *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluation.samples=2"], "without evaluation.task"),
        (["checkpoint.best_metric=eval/accuracy"], "needs evaluation.task"),
        (["checkpoint.best_metric=reward"], "needs rewards.task"),
        (["evaluation.task=gsm8k", "evaluation.pass_at=[2]"], "pass@k needs k samples or more"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_comparison_needs_a_run(inputs: dict[str, Any], capsys: Any) -> None:
    words = [
        "evaluate",
        inputs["student.path"],
        "--task",
        TASK,
        "--data",
        inputs["data.source"],
        "--compare",
        "teacher",
    ]
    assert main(words) == 2
    assert "--compare teacher needs a run" in capsys.readouterr().err


def test_a_dump_reads_back(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(inputs, tmp_path / "run", **JUDGED)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
