"""Final answers are found where models write them, and compared as what they mean."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from opd_megatron.tasks import task_named
from opd_megatron.tasks.answers import in_box, last_number, same

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("She makes 18 dollars.\n#### 18", "#### 18", 1),
        ("#### 18 dollars", "18", 1),
        ("The answer is $18.", "... #### 18", 1),
        ("So \\boxed{18}, since 7 are eaten.", "#### 18", 1),
        ("First 9, then 18", "#### 18", 1),
        ("#### 1,234.00", "#### 1234", 1),
        ("#### -5", "#### -5", 1),
        ("#### 5", "#### -5", 0),
        ("The answer is 17, not 18.", "#### 18", 0),
        ("#### 19\nOr is it 18?", "#### 18", 0),
        ("#### 0.5", "#### 1/2", 1),
        ("", "#### 18", 0),
        ("no number at all", "#### 18", 0),
        ("18" * 50, "#### 18", 0),
    ],
)
def test_gsm8k(answer: str, gold: str, score: float) -> None:
    assert task_named("gsm8k").verify(answer, {"answer": gold}) == score


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        (r"Thus \boxed{\frac{1}{2}}.", r"\boxed{0.5}", 1),
        (r"\boxed{\frac{1}{2}} or rather \boxed{2}", r"2", 1),
        (r"\boxed{x^2 + 2x + 1}", r"\boxed{(x+1)^2}", 1),
        (r"\boxed{\{1, 2\}}", r"\boxed{\{2, 1\}}", 1),
        (r"\boxed{3}", r"\boxed{4}", 0),
        (r"the answer is 4", r"\boxed{4}", 0),
        (r"\boxed{4", r"\boxed{4}", 0),
        (r"\boxed{\text{Evelyn}}", r"\boxed{\text{Evelyn}}", 1),
    ],
)
def test_math(answer: str, gold: str, score: float) -> None:
    assert task_named("math").verify(answer, {"answer": gold}) == score


def test_a_box_is_matched_brace_by_brace() -> None:
    assert in_box(r"a \boxed{1} b \fbox{\frac{a}{b}} c") == r"\frac{a}{b}"
    assert in_box("none") is None
    assert in_box(r"\boxed 3") is None


def test_the_last_number_is_behind_the_word_answer_where_there_is_one() -> None:
    assert last_number("The answer is 3, which is less than 5") == "3"
    assert last_number("3 and 5") == "5"
    assert last_number("nothing") is None
    assert same("1,000", "$1000.")


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not there")
def test_the_gold_answers_of_gsm8k_score_1_and_0_when_their_number_is_changed() -> None:
    task = task_named("gsm8k")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    assert len(rows) == 1319
    for row in rows:
        number = row["answer"].rpartition("#### ")[2].replace(",", "")
        changed = re.sub(r"#### .*", f"#### {int(number) + 1}", row["answer"])
        assert task.verify(row["answer"], row) == 1, row
        assert task.verify(changed, row) == 0, row


@pytest.mark.parametrize("answer", ["", " ", "\n\n", "\x00", "\ufffd"])
@pytest.mark.parametrize("name", ["gsm8k", "math", "code", "ifeval", "reasoning_gym:chain_sum"])
def test_an_empty_answer_is_wrong_and_no_error(name: str, answer: str) -> None:
    row = {
        "answer": "#### 5", "prompt": "2 + 3 =", "test_list": ["assert f() == 5"],
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"], "kwargs": [{}, {}],
        "metadata": {"seed": 0, "index": 0, "size": 1, "arguments": {}},
    }  # fmt: skip
    assert task_named(name).verify(answer, row) == 0
