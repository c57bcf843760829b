"""Runs with rewards: hybrid losses against a dense reference, and verifiers that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_megatron.config import RunConfig
from opd_megatron.errors import ConfigError, DataError
from opd_megatron.train import check
from tests.e2e.runs import make_inputs, small_config
from tests.e2e.test_given_answers import _train
from tests.ranks import run_ranks
from tests.teacher.dense import DenseStep, one_step
from tests.teacher.test_placements import STUDENTS, _agree
from tests.teacher.test_routing import _run

OF = "tests.rewards.verifiers:"
STOPS = json.dumps({"eos_token_id": [256, 258, *range(0, 256, 5)]})
"""A generation_config.json whose stops an untrained model comes to."""
HYBRID = {
    "objective.lambda_rl": 0.7, "objective.lambda_distill": 0.4, "rewards.task": OF + "even",
    "rollout.samples_per_prompt": 4, "rollout.prompts_per_step": 2, "parallel.micro_batch_size": 2,
    "optimizer.eps": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers may end early: a fifth of all bytes are stops."""
    found = make_inputs(tmp_path_factory.mktemp("rewards"))
    (Path(found["student.path"]) / "generation_config.json").write_text(STOPS)
    return found


def _even(text: str) -> float:
    return sum(letter.isalpha() for letter in text) % 4 / 3


def _dense(config: RunConfig, models: Any, rollouts: Any, scores: list[float]) -> DenseStep:
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (models.student, models.teachers[0][0])
    )
    table = np.array(scores).reshape(-1, 4)
    spread = table.std(1, ddof=1, keepdims=True)
    advantages = ((table - table.mean(1, keepdims=True)) / (spread + 1e-4)).ravel()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids.tolist()]])
        places = slice(len(rollout.prompt.token_ids) - 1, -1)
        log_p = student(ids).logits[0, places].log_softmax(-1)
        with torch.no_grad():
            log_q = teacher(ids).logits[0, places].log_softmax(-1)
        now = log_p.gather(1, rollout.response_ids[:, None])[:, 0]
        weight = (now.detach() - rollout.logprobs.double()).exp().clamp(max=2.0)
        policy = -(weight * (now - now.detach()).exp() * advantage).sum()
        divergence = (log_p.exp() * (log_p - log_q)).sum()
        total = total + config.objective.lambda_distill * divergence + config.objective.lambda_rl * policy
        tokens += len(rollout.response_ids)
    gradients = torch.autograd.grad(total / tokens, [*student.parameters()])
    return DenseStep(float(total / tokens), float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))


def _one_step(rank: int, world_size: int, config: RunConfig) -> tuple[dict[str, Any], DenseStep, list[float]]:
    models = check(config)
    row, taken, tokenizer = one_step(config, models)
    scores = [
        _even(tokenizer.decode(each.response_ids.tolist(), skip_special_tokens=True))
        if each.finish_reason == "stop" else 0.0
        for each in taken
    ]  # fmt: skip
    return row, _dense(config, models, taken, scores), scores


@pytest.mark.parametrize("student", ["one", "TP2", "DP2"])
def test_a_hybrid_step_equals_the_dense_reference(inputs: dict[str, Any], tmp_path: Path, student: str) -> None:
    ranks = 1 if student == "one" else 2
    config = small_config(inputs, tmp_path / "run", **HYBRID, **STUDENTS[student])
    found = run_ranks(ranks, _one_step, config)
    for row, expected, scores in found:
        assert len(set(scores)) > 1, "some answers are better than others"
        assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
        assert row["reward"] == pytest.approx(sum(scores) / len(scores))
        assert row["reward/errors"] == row["reward/timeouts"] == 0


def test_a_hybrid_run_is_the_same_in_every_layout(inputs: dict[str, Any], tmp_path: Path) -> None:
    alone = _run(inputs, tmp_path / "alone", 1, **HYBRID)
    found = _run(inputs, tmp_path / "run", 4, **HYBRID, **STUDENTS["TP2 PP2"])
    _agree(found, alone)
    assert [row["reward"] for row in found[1][1:]] == [row["reward"] for row in alone[1][1:]]


@pytest.mark.parametrize(
    ("name", "counted", "limit"), [("hangs", "reward/timeouts", 0.2), ("raises", "reward/errors", 10.0)]
)
def test_a_verifier_that_fails_ends_no_run(
    inputs: dict[str, Any], tmp_path: Path, name: str, counted: str, limit: float
) -> None:
    settings = HYBRID | {"rewards.task": f"tests.tasks.verifiers:{name}", "rewards.time_limit": limit, "steps": 2}
    for row in _train(small_config(inputs, tmp_path / "run", **settings))[1:]:
        assert row["reward"] == 0
        assert row[counted] > 0
        assert row["reward/equal"] == 1
        assert row["policy_loss"] == 0


def test_rewards_may_be_measured_alone(inputs: dict[str, Any], tmp_path: Path) -> None:
    """A distillation that says how many answers are right, also of rows of one task alone."""
    plain = {"steps": 2, "rollout.prompts_per_step": 8}
    expected = _train(small_config(inputs, tmp_path / "plain", **plain))
    found = _train(small_config(inputs, tmp_path / "run", **plain, **{"rewards.task": OF + "even"}))
    assert [row["loss"] for row in found[1:]] == [row["loss"] for row in expected[1:]]
    assert all(0 <= row["reward"] <= 1 for row in found[1:])
    assert all("time/reward" in row for row in found[1:])
    assert not any("reward" in row for row in expected)


def test_penalties_are_taken_off(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = HYBRID | {"rewards.length_penalty": 0.5, "rewards.format_penalty": 0.25, "steps": 1}
    [_, row] = _train(small_config(inputs, tmp_path / "run", **settings))
    of_length = 0.5 * row["rollout/mean_length"] / 8
    of_format = 0.25 * row["rollout/truncated"]
    assert row["reward/with_penalties"] == pytest.approx(row["reward"] - of_length - of_format)


def test_the_task_asks_for_what_it_wants(inputs: dict[str, Any], tmp_path: Path) -> None:
    from opd_megatron.run.data_command import show_data

    asked = {"rewards.task": "gsm8k", "data.max_prompt_tokens": 300}
    lines = "\n".join(show_data(small_config(inputs, tmp_path / "run", **asked), 1))
    assert "behind ####" in lines
    off = asked | {"rewards.instruction": False}
    assert "####" not in "\n".join(show_data(small_config(inputs, tmp_path / "run", **off), 1))


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"objective.lambda_rl": 0.5}, ConfigError, r"lambda_rl=0.5 needs rewards\.task"),
        (
            HYBRID | {"rollout.samples_per_prompt": 1}, ConfigError,
            "samples_per_prompt=1: an answer's advantage is over the others",
        ),
        ({"rewards.task": "gsm9k"}, ConfigError, "unknown task 'gsm9k': did you mean 'gsm8k'"),
        (
            {"rewards.task": "gsm8k", "data.answer_column": None, "data.max_prompt_tokens": 300}, DataError,
            "compares with a gold answer, but prompt",
        ),
        (
            {"rewards.task": "tests.tasks.verifiers:TASK"}, DataError,
            "has no column 'extra', which the run's task wants",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(
    inputs: dict[str, Any], tmp_path: Path, settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as failure:
        _train(small_config(inputs, tmp_path / "run", **settings))
    assert "\n" not in str(failure.value)


def test_another_reward_is_another_run(inputs: dict[str, Any], tmp_path: Path) -> None:
    _train(small_config(inputs, tmp_path / "run", **HYBRID, steps=1))
    with pytest.raises(ConfigError, match=r"belongs to a run with rewards\.advantage='grpo'"):
        _train(small_config(inputs, tmp_path / "run", **HYBRID, **{"rewards.advantage": "group_mean"}, steps=2))
    _train(small_config(inputs, tmp_path / "run", **HYBRID, **{"rewards.workers": 1}, steps=2))
