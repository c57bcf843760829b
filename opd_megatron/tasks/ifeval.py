"""Instructions whose keeping can be checked (IFEval, arXiv 2311.07911): rows with `prompt`, `instruction_id_list` and
`kwargs`, judged by the checkers of the package if-verifiable.

Two of the 25, number_sentences and capital_word_frequency, need data of NLTK (`python -m nltk.downloader punkt
punkt_tab`); where it is missing, their answers score 0 and are counted as errors.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from opd_megatron.tasks.base import Row, Task, TaskData


def verify(answer: str, row: Row) -> float:
    """1 where every instruction is kept (strict, as in the paper)."""
    return float(bool(answer.strip()) and all(kept(answer, row).values()))


def kept(answer: str, row: Row) -> dict[str, bool]:
    """Which of the row's instructions an answer keeps."""
    from if_verifiable.common import strip_thinking

    text = strip_thinking(answer)
    return {
        f"{number}:{name}": bool(text.strip()) and _keeps(text, name, arguments, str(row.get("prompt") or ""))
        for number, (name, arguments) in enumerate(_instructions(row))
    }


def _keeps(text: str, name: str, arguments: Mapping[str, Any], prompt: str) -> bool:
    checker = _checkers()[name](name)
    checker.build_description(**{key: value for key, value in arguments.items() if value is not None})
    wanted = checker.get_instruction_args()
    if wanted and "prompt" in wanted:
        checker.build_description(prompt=prompt)
    try:
        return bool(checker.check_following(text))
    except LookupError as error:
        if "nltk" in str(error).lower():
            raise LookupError(
                f"{name} needs data of NLTK that is not here: python -m nltk.downloader punkt punkt_tab"
            ) from None
        raise


@functools.cache
def _checkers() -> Mapping[str, Any]:
    import langdetect
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    langdetect.DetectorFactory.seed = 0  # it draws at random, and one answer must not score twice differently
    found: Mapping[str, Any] = INSTRUCTION_DICT
    return found


def _instructions(row: Row) -> list[tuple[str, Mapping[str, Any]]]:
    names, arguments = row["instruction_id_list"], row["kwargs"]
    return list(zip(names, arguments or [{}] * len(names), strict=True))


def check(row: Row) -> None:
    """Raises ValueError for a row that is none of IFEval's."""
    names, arguments = row["instruction_id_list"], row["kwargs"]
    if not isinstance(names, list) or not names:
        raise ValueError("must have a list of instructions in column 'instruction_id_list'")
    if arguments and (not isinstance(arguments, list) or len(arguments) != len(names)):
        raise ValueError(f"must have as many entries in column 'kwargs' as in 'instruction_id_list', {len(names)}")
    unknown = [name for name in names if name not in _checkers()]
    if unknown:
        raise ValueError(f"has the instruction {unknown[0]!r}, for which there is no checker")


TASK = Task(
    verify, check=check, needs_answer=False, columns=("prompt?", "instruction_id_list", "kwargs"),
    data=TaskData("google/IFEval", split="train", prompt_column="prompt", answer_column=None),
)  # fmt: skip
