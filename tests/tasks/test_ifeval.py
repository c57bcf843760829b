"""IFEval: an answer that keeps and one that breaks each instruction whose checker works without downloads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from opd_megatron.config import RewardsConfig
from opd_megatron.data.rows import Example
from opd_megatron.errors import DataError
from opd_megatron.rewards import check_rewards
from opd_megatron.tasks.ifeval import check, kept, verify

pytest.importorskip("if_verifiable", reason="if-verifiable is not installed")
WORDS = "one two three four five six seven eight nine ten "
ENGLISH = "the weather is nice today and we are going to walk along the river with our friends"
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "keywords:existence": ({"keywords": ["river", "bank"]}, "By the river bank.", "By the river."),
    "keywords:frequency": ({"keyword": "tea", "frequency": 2, "relation": "at least"}, "Tea or tea.", "Tea."),
    "keywords:forbidden_words": ({"forbidden_words": ["bad"]}, "All good.", "All bad."),
    "keywords:letter_frequency": (
        {"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "Jazz.", "Jaz.",
    ),
    "language:response_language": (
        {"language": "de"}, "Das Wetter ist heute sehr schön und wir gehen spazieren.", ENGLISH,
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "One.\n\n***\n\nTwo.", "One."),
    "length_constraints:number_words": ({"num_words": 20, "relation": "at least"}, WORDS * 2, WORDS),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, "First.\n\nThen more.", "First.\n\nNow more.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "Dear [name] of [town]", "Dear [name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. Write soon.", "Bye."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n* two", "* one"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Of course."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* and *two*", "*one* and two"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2}, "Section 1\nHello.\nSection 2\nBye.", "Section 1\nHello.",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": [1, 2]}\n```', "{a: 1"),
    "detectable_format:title": ({}, "<<A title>>\nText.", "A title\nText."),
    "combination:two_responses": ({}, "One answer.******Another answer.", "One answer."),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say hello."}, "Say hello.\nHello!", "Hello!",
    ),
    "startend:end_checker": ({"end_phrase": "That is all."}, "Well. That is all.", "That is all. Well."),
    "change_case:english_capital": ({}, ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": ({}, ENGLISH, ENGLISH.capitalize()),
    "punctuation:no_comma": ({}, "No pause at all.", "A pause, here."),
    "startend:quotation": ({}, '"All of it."', 'Some of "it".'),
}  # fmt: skip
NEED_NLTK = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}


def _row(*names: str) -> dict[str, Any]:
    nothing = {"keyword": None, "num_words": None}
    return {
        "prompt": "Say hello.", "instruction_id_list": list(names),
        "kwargs": [nothing | CASES[name][0] for name in names],
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_answer_that_keeps_an_instruction_scores_1_and_one_that_breaks_it_0(name: str) -> None:
    _, keeps, breaks = CASES[name]
    assert verify(keeps, _row(name)) == 1
    assert verify(breaks, _row(name)) == 0
    assert verify("", _row(name)) == 0


def test_the_cases_are_all_that_work_without_downloads() -> None:
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    assert len(CASES) >= 22
    assert INSTRUCTION_DICT.keys() - CASES.keys() == NEED_NLTK


def test_we_agree_with_the_package_on_its_own_evaluation() -> None:
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    names = sorted(CASES)
    for first, second in itertools.pairwise(names):
        row = _row(first, second)
        for answer in (*CASES[first][1:], *CASES[second][1:], f"<think>x, y</think>{CASES[first][1]}"):
            _, scores = evaluate_instructions(
                answer, row["instruction_id_list"], row["kwargs"], row["prompt"], INSTRUCTION_DICT
            )
            assert verify(answer, row) == scores.binary_strict, (first, second, answer)


def test_every_instruction_of_a_row_must_be_kept() -> None:
    row = _row("punctuation:no_comma", "detectable_format:title")
    assert verify("<<A title>> and text", row) == 1
    assert verify("<<A title>>, and text", row) == 0
    assert list(kept("<<A title>>, and text", row).values()) == [False, True]


def test_a_checker_that_needs_a_download_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    row = {"instruction_id_list": ["change_case:capital_word_frequency"], "prompt": "x",
           "kwargs": [{"capital_frequency": 1, "capital_relation": "at least"}]}  # fmt: skip
    with pytest.raises(LookupError, match=r"needs data of NLTK that is not here: python -m nltk\."):
        verify("A WORD", row)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"instruction_id_list": [], "kwargs": []}, "must have a list of instructions"),
        ({"instruction_id_list": ["a:b"], "kwargs": [{}]}, "the instruction 'a:b', for which there is no checker"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "as many entries in column 'kwargs'"),
    ],
)  # fmt: skip
def test_rows_that_are_none_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(fields)
    with pytest.raises(DataError, match="task 'ifeval' cannot judge answers to prompt 'x:1', which") as error:
        check_rewards(RewardsConfig(task="ifeval"), [Example("x:1", "q", fields=fields)])
    assert "\n" not in str(error.value)
