"""Runs on answers that the student did not sample: gold ones, or ones that a run has saved; alone or beside its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.config import RunConfig
from opd_megatron.data.saved_rollouts import read_rollouts
from opd_megatron.errors import ConfigError, DataError, MissingPathError
from opd_megatron.run.checks import check_run
from opd_megatron.trainer import OPDTrainer
from opd_megatron.types import Rollout
from tests.e2e.runs import make_inputs, small_config
from tests.ranks import run_ranks
from tests.teacher.dense import dense_step
from tests.teacher.test_cached import _cache, _cached
from tests.teacher.test_placements import STUDENTS, _agree
from tests.teacher.test_routing import _run

GIVEN = {"data.on_policy_fraction": 0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def saved(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has saved what it sampled."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    _run(inputs, folder, 1, **{"logging.rollouts": True})
    return folder


def _train(config: RunConfig) -> list[dict[str, Any]]:
    with OPDTrainer.from_config(config) as trainer:
        trainer.train()
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def _steps(
    rank: int, world_size: int, config: RunConfig, steps: int
) -> tuple[list[dict[str, Any]], list[list[Rollout]]]:
    taken: list[list[Rollout]] = []

    def keep(rollouts: Any) -> Any:
        taken.append(list(rollouts))
        return rollouts

    with OPDTrainer.from_config(config, check_run(config)) as trainer:
        trainer.stages = (keep,)
        if config.samples:
            trainer.rollout_client.start(0)
        return [trainer.step().as_dict() for _ in range(steps)], taken


def test_a_step_on_gold_answers_equals_the_dense_reference_and_needs_no_engine(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    config = small_config(inputs, tmp_path / "run", **GIVEN, **{"rollout.engine": "vllm", "rollout.max_new_tokens": 32})
    [([row], [taken])] = run_ranks(1, _steps, config, 1)
    assert [each.response_ids.tolist() for each in taken] == [list(each.prompt.answer_ids or ()) for each in taken]
    models = check_run(config)
    expected = dense_step(
        str(models.student), taken, lambda _: [(str(models.teachers[0][0]), 1.0, None)], models.vocab_size
    )
    assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
    assert row["rollout/on_policy"] == 0
    assert "rollout/mean_length" not in row
    assert "mismatch" not in row
    assert not (tmp_path / "run" / "rollout-0.log").exists()


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_share_of_the_prompts_is_sampled(inputs: dict[str, Any], tmp_path: Path, ahead: int) -> None:
    settings = {
        "data.on_policy_fraction": 0.7, "rollout.samples_per_prompt": 2, "rollout.prompts_per_step": 4, "steps": 5,
        "rollout.steps_ahead": ahead, "rollout.max_new_tokens": 32,
    }  # fmt: skip
    config = small_config(inputs, tmp_path / "run", **settings)
    [(rows, taken)] = run_ranks(1, _steps, config, 5)
    given = [sum(each.policy_version < 0 for each in step) // 2 for step in taken]
    assert sum(given) == 6, "0.3 of 20 prompts"
    assert set(given) <= {1, 2}
    for row, step in zip(rows, taken, strict=True):
        assert row["rollout/on_policy"] == 1 - sum(each.policy_version < 0 for each in step) / 8
        assert row["policy_lag"] == (ahead if row["step"] > 1 else 0)
        assert [each.group for each in step] == [0, 0, 1, 1, 2, 2, 3, 3]
        for group in range(0, 8, 2):
            assert (step[group].policy_version < 0) == (step[group + 1].policy_version < 0), "a prompt's are alike"
            if step[group].policy_version < 0:
                assert step[group].response_ids.tolist() == list(step[group].prompt.answer_ids or ())


@pytest.mark.parametrize("settings", [GIVEN, {"data.on_policy_fraction": 0.5, "rollout.steps_ahead": 1}])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    inputs: dict[str, Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    common = settings | {"checkpoint.every": 2, "optimizer.decay": "constant"}
    whole = _train(small_config(inputs, tmp_path / "whole", **common, steps=4))
    _train(small_config(inputs, tmp_path / "parts", **common, steps=2))
    parts = _train(small_config(inputs, tmp_path / "parts", **common, steps=4))
    if not settings.get("rollout.steps_ahead"):  # the shorter run samples nothing ahead of its last step
        assert [row["loss"] for row in whole[1:]] == [row["loss"] for row in parts[1:]]
        first, second = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "parts"))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["step"] for row in parts] == [row["step"] for row in whole]


def test_saved_answers_are_trained_on_with_a_cached_teacher(
    inputs: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    """Neither an engine nor the teacher's weights: what other systems call offline distillation, exact."""
    given = GIVEN | {"data.answers": str(saved)}
    expected = _run(inputs, tmp_path / "expected", 1, **given)
    _cache(inputs, tmp_path / "states", 1, **given)
    found = _run(inputs, tmp_path / "run", 2, **STUDENTS["DP2"], **given, **_cached(tmp_path / "states"))
    _agree(found, expected)
    assert expected[1][-1]["reverse_kl"] < expected[1][1]["reverse_kl"]
    names = {each.prompt.id for each in read_rollouts(saved)}
    config = small_config(inputs, tmp_path / "other", **given)
    [(_, taken)] = run_ranks(1, _steps, config, 3)
    assert {each.prompt.id for step in taken for each in step} <= names, "prompts without an answer are left out"


def test_other_answers_are_another_run(inputs: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    from opd_megatron.errors import CheckpointError

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (saved / "rollouts").glob("*.jsonl"):
        (copy / file.name).write_text(file.read_text())
    given = GIVEN | {"data.answers": str(saved), "steps": 2}
    _train(small_config(inputs, tmp_path / "run", **given))
    _train(small_config(inputs, tmp_path / "run", **given | {"data.answers": str(copy)}))  # the same by content
    lines = (copy / "step-000001.jsonl").read_text().splitlines()
    changed = json.loads(lines[0])
    changed["response_ids"] = [*changed["response_ids"][:-1], 7]
    changed["logprobs"] = None
    (copy / "step-000001.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]))
    with pytest.raises(CheckpointError, match="a run with other answers"):
        _train(small_config(inputs, tmp_path / "run", **given | {"data.answers": str(copy)}))


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        (GIVEN | {"objective.type": "jsd"}, ConfigError, "on_policy_fraction=0.0 needs an objective over whole"),
        ({"data.answers": "x"}, ConfigError, "data.answers='x' has no effect with data.on_policy_fraction=1"),
        (GIVEN | {"data.answers": "/nowhere"}, MissingPathError, "'/nowhere' holds no saved rollouts"),
        (GIVEN | {"data.answer_column": None}, DataError, "none of 40 prompts has an answer in data.answers='gold'"),
        ({"data.on_policy_fraction": 1.5}, ConfigError, "data.on_policy_fraction"),
    ],
)
def test_what_cannot_be_is_named(
    inputs: dict[str, Any], tmp_path: Path, settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as failure:
        _train(small_config(inputs, tmp_path / "run", **settings))
    assert "\n" not in str(failure.value)


def test_answers_to_other_prompts_are_refused(inputs: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    settings = GIVEN | {"data.answers": str(saved), "data.system_prompt": "Be brief."}
    with pytest.raises(DataError, match="belongs to another prompt of that name"):
        _train(small_config(inputs, tmp_path / "run", **settings))
