"""Python programs that are judged by tests, each run in the sandbox: rows as those of MBPP (arXiv 2108.07732;
`test_list`, `test_setup_code`), of HumanEval (arXiv 2107.03374; `prompt`, `test`, `entry_point`), or with `tests`."""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

from opd_megatron.tasks.base import Row, Task, TaskData
from opd_megatron.tasks.sandbox import SandboxError, confinement, run_program

_BLOCK = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_ASKED = "Answer with the whole program in one ```python block."


def verify(answer: str, row: Row) -> float:
    """1 where the program passes every test."""
    program = program_of(answer, row)
    return float(program is not None and run_program(program).passed)


def program_of(answer: str, row: Row) -> str | None:
    """Puts an answer and the row's tests together; None where the answer holds no program."""
    found = code_in(answer)
    if found is None:
        return None
    entry, tests = row.get("entry_point"), _tests(row)
    if entry:
        return f"{_completed(str(row['prompt']), found, entry)}\n\n{tests}\n\ncheck({entry})\n"
    setup = row.get("test_setup_code") or ""
    return f"{setup}\n{found}\n\n{tests}\n"


def code_in(answer: str) -> str | None:
    """The last fenced block of an answer, or all of it; None where that is nothing."""
    blocks = _BLOCK.findall(answer)
    found: str = blocks[-1] if blocks else answer
    return found if found.strip() else None


def _completed(prompt: str, code: str, entry: str) -> str:
    """A whole function stands behind what the prompt has before its own; anything else goes on where the prompt
    ends."""
    prompt = _stub(prompt, entry)
    if re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(entry)}\b", code, re.MULTILINE):
        before = prompt[: _start(prompt, entry)]
        return f"{before}\n{textwrap.dedent(code)}"
    if not code[:1].isspace():
        code = textwrap.indent(code, "    ")
    return f"{prompt.rstrip()}\n{code}"


def _stub(prompt: str, entry: str) -> str:
    """The program of a prompt, without an instruction that may stand around it."""
    start = _start(prompt, entry)
    lines = prompt[:start].splitlines(keepends=True)
    while lines and not _is_python("".join(lines)):
        lines.pop(0)
    return "".join(lines) + prompt[start:]


def _start(prompt: str, entry: str) -> int:
    found = re.search(rf"^(?:async\s+)?def\s+{re.escape(entry)}\b", prompt, re.MULTILINE)
    return found.start() if found else len(prompt)


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def _tests(row: Row) -> str:
    found: Any = row.get("test_list") or row.get("test") or row.get("tests") or ""
    return found if isinstance(found, str) else "\n".join(map(str, found))


def check(row: Row) -> None:
    """Raises ValueError unless the row has tests."""
    if not _tests(row).strip():
        raise ValueError("has no tests (columns test_list, test or tests)")
    if confinement()[0] is None:
        raise ValueError(f"cannot be judged: {SandboxError(confinement()[1])}")


def instruction(row: Row) -> str:
    """What a program is to look like; names are those of the tests, which MBPP's questions do not tell."""
    if row.get("entry_point"):
        return _ASKED
    return f"Your code should pass these tests:\n\n{_tests(row)}\n\n{_ASKED}"


TASK = Task(
    verify, instruction=instruction, extract=code_in, check=check, needs_answer=False,
    columns=("test_list?", "test_setup_code?", "prompt?", "test?", "entry_point?", "tests?"),
    data=TaskData("openai/openai_humaneval", prompt_column="prompt", answer_column="canonical_solution"),
)  # fmt: skip
