"""Tasks of reasoning-gym: their questions, their scores, and where they say no."""

from __future__ import annotations

import json
from typing import Any

import pytest

from opd_megatron.config import load_config
from opd_megatron.data.sources import read_rows
from opd_megatron.errors import ConfigError, DataError
from opd_megatron.tasks import task_named
from opd_megatron.tasks.reasoning import final, library, questions

NAMES = ("chain_sum", "basic_arithmetic", "leg_counting", "spell_backward", "number_sorting", "countdown")


@pytest.mark.parametrize("name", NAMES)
def test_a_gold_answer_scores_1_and_nonsense_less(name: str) -> None:
    task = task_named(f"reasoning_gym:{name}")
    for row in questions(f"reasoning_gym:{name}", 3, 4, {}):
        row = json.loads(json.dumps(row))  # as it travels to the process that judges
        gold = row["answer"]
        if name == "countdown":  # whose answers are expressions that come to a number
            data = library().create_dataset(name, seed=3_000_009, size=4)
            gold = data[row["metadata"]["index"]]["metadata"]["expression"]
        assert task.verify(f"It must be <answer>{gold}</answer>.", row) == pytest.approx(1)
        assert task.verify("<answer>nonsense</answer>", row) < 0.5
        assert task.verify("", row) == 0


def test_scores_are_the_librarys() -> None:
    name = "chain_sum"
    data = library().create_dataset(name, seed=0, size=5)
    task = task_named(f"reasoning_gym:{name}")
    for index, row in enumerate(questions(f"reasoning_gym:{name}", 0, 5, {})):
        assert row["question"] == data[index]["question"]
        for answer in (row["answer"], "7", f"about {row['answer']}"):
            assert task.verify(answer, row) == pytest.approx(data.score_answer(answer, data[index]))


def test_rows_of_a_file_keep_their_own_metadata() -> None:
    entry = library().create_dataset("chain_sum", seed=5, size=1)[0]
    row = {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
    assert task_named("reasoning_gym:chain_sum").verify(entry["answer"], row) == 1


def _rows(*overrides: str) -> Any:
    return read_rows(load_config(None, ["data.source=reasoning_gym:chain_sum", *overrides]))


def test_questions_are_a_source_of_data_with_arguments() -> None:
    arguments = "data.source_arguments={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2}"
    rows = _rows(arguments, "data.limit=50", "evaluation.prompts=8")
    assert len(rows.held_out) == 8
    assert 30 < len(rows.train) <= 50
    assert not {row.question for row in rows.train} & {row.question for row in rows.held_out}
    assert all(row.answer is not None for row in rows.train)
    again = _rows(arguments, "data.limit=50", "evaluation.prompts=8")
    assert [row.question for row in again.train] == [row.question for row in rows.train]
    other = _rows(arguments, "data.limit=50", "evaluation.prompts=8", "seed=1")
    assert [row.question for row in other.train] != [row.question for row in rows.train]
    judged = _rows(arguments, "data.limit=8", "rewards.task=reasoning_gym:chain_sum")
    assert "between <answer> and </answer>" in judged.train[0].question
    assert judged.train[0].fields["metadata"]["arguments"]["max_terms"] == 2


def test_what_is_final() -> None:
    assert final("<answer>1</answer> no, <answer> 2 </answer>") == "2"
    assert final("<answer>3") == "3"
    assert final(" 4 ") == "4"
    assert final(" ") is None


def test_what_is_unknown_is_one_line() -> None:
    with pytest.raises(ConfigError, match="did you mean reasoning_gym:chain_sum"):
        task_named("reasoning_gym:chain_sums")
    with pytest.raises(ConfigError, match="did you mean reasoning_gym:chain_sum"):
        read_rows(load_config(None, ["data.source=reasoning_gym:chain_sums"]))
    with pytest.raises(DataError, match=r"chain_sum does not take \{'terms': 2\}") as error:
        _rows("data.source_arguments={terms: 2}")
    assert "\n" not in str(error.value)
