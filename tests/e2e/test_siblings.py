"""A teacher that reads another answer to the same question which was right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config import RunConfig
from opd_megatron.errors import ConfigError
from opd_megatron.train import check
from opd_megatron.types import Rollout
from tests.e2e.runs import make_inputs, small_config
from tests.e2e.test_rewards import HYBRID, STOPS
from tests.ranks import RankError, run_ranks
from tests.teacher.dense import DenseStep, dense_step, one_step
from tests.teacher.test_placements import STUDENTS
from tests.teacher.test_routing import _run

SIBLING = HYBRID | {"objective.lambda_rl": 0.0, "teachers.0.prompt": "{prompt} For example: {sibling}"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = make_inputs(tmp_path_factory.mktemp("siblings"))
    (Path(found["student.path"]) / "generation_config.json").write_text(STOPS)
    return found


def _one_step(rank: int, world_size: int, config: RunConfig) -> tuple[dict[str, Any], DenseStep, int]:
    models = check(config)
    row, taken, tokenizer = one_step(config, models)

    def text(rollout: Rollout) -> str:
        return str(tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True))

    def right(rollout: Rollout) -> bool:
        score = sum(letter.isalpha() for letter in text(rollout)) % 4 / 3
        return rollout.finish_reason == "stop" and score > 0.5

    def context(rollout: Rollout) -> tuple[int, ...] | None:
        group = [each for each in taken if each.group == rollout.group]
        place = next(i for i, each in enumerate(group) if each is rollout)
        others = [each for each in [*group[place + 1 :], *group[:place]] if right(each)]
        if not others:
            return None
        message = f"{rollout.prompt.text} For example: {text(others[0])}"
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        return tuple(tokenizer(rendered, add_special_tokens=False).input_ids)

    contexts = [context(each) for each in taken]
    of_rollout = {id(each): found for each, found in zip(taken, contexts, strict=True)}
    teacher = str(models.teachers[0][0])
    expected = dense_step(
        str(models.student), taken, lambda each: [(teacher, 1.0, of_rollout[id(each)])], models.vocab_size
    )
    return row, expected, sum(found is not None for found in contexts)


@pytest.mark.parametrize("student", ["one", "SP2"])
def test_a_right_answer_of_the_group_is_read_by_the_teacher(
    inputs: dict[str, Any], tmp_path: Path, student: str
) -> None:
    settings = SIBLING | {"objective.lambda_distill": 1.0, "rollout.prompts_per_step": 4}
    config = small_config(inputs, tmp_path / "run", **settings, **STUDENTS[student])
    for row, expected, count in run_ranks(1 if student == "one" else 2, _one_step, config):
        assert 0 < count < 16, "some answers have a sibling and some have none"
        assert row["reward/siblings"] == count / 16
        assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)


def test_the_student_learns_from_its_own_success(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Self-distillation (SDPO), evaluated like any run."""
    settings = SIBLING | {
        "teachers.0.path": "student", "teachers.0.update": "live", "objective.lambda_distill": 1.0,
        "evaluation.every": 1,
    }  # fmt: skip
    rows = _run(inputs, tmp_path / "run", 1, **settings)[1]
    assert any(row["reward/siblings"] > 0 and row["reverse_kl"] > 0 for row in rows[1:]), (
        "it reads more than the student"
    )
    assert all("eval/forward_kl" in row for row in rows)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rewards.task": None}, r"teachers\.0\.prompt uses \{sibling\}.* needs rewards\.task"),
        ({"rollout.samples_per_prompt": 1}, r"samples_per_prompt of 2 or more"),
        ({"teachers.0.placement": "cached", "teachers.0.cache": "x"}, "there is nothing to cache"),
    ],
)
def test_what_cannot_be_is_named(inputs: dict[str, Any], tmp_path: Path, settings: Any, words: str) -> None:
    with pytest.raises((RankError, ConfigError), match=words):
        _run(inputs, tmp_path / "run", 1, **(SIBLING | settings))
