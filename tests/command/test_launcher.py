"""How runs on several ranks start and end. The ranks do what tests/launched.py says, under a real torchrun agent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd_megatron.command.launcher import available_cores, run_command
from opd_megatron.errors import ConfigError, MissingPathError
from tests.ranks import as_launched

LAUNCH = """
import os, sys
from opd_megatron.command.launcher import launch
for case in sys.argv[2:]:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{sys.argv[1]}/{case}.{name}", os.O_WRONLY | os.O_CREAT), number)
    code = launch("tests.launched", [case], 2)
    with open(f"{sys.argv[1]}/{case}.code", "w") as file:
        file.write(str(code))
"""
CASES = (
    "every_rank_refuses",
    "last_rank_refuses_and_breaks_the_others",
    "last_rank_crashes",
    "last_rank_is_killed",
    "prints_threads",
)


@dataclass
class Ended:
    code: int
    stdout: str
    stderr: str


def start(folder: Path, *cases: str) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "WORLD_SIZE")}
    return subprocess.Popen([sys.executable, "-c", LAUNCH, str(folder), *cases], env=environment)


def ended(folder: Path, case: str) -> Ended:
    code, stdout, stderr = ((folder / f"{case}.{name}").read_text() for name in ("code", "out", "err"))
    return Ended(int(code), stdout, stderr)


Outcome = Callable[[str], Ended]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All cases in one parent process, one launch after the other: importing torch is what takes the time."""
    folder = tmp_path_factory.mktemp("launches")
    assert start(folder, *CASES).wait(timeout=600) == 0
    return lambda case: ended(folder, case)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_an_error_that_every_rank_meets_is_one_line_and_exit_code_2(outcome: Outcome) -> None:
    end = outcome("every_rank_refuses")
    assert (end.code, end.stderr) == (2, "opd-megatron: error: steps=0 must be positive: raise it\n")


def test_an_error_of_one_rank_is_the_only_line_even_when_it_breaks_the_others(outcome: Outcome) -> None:
    end = outcome("last_rank_refuses_and_breaks_the_others")
    assert (end.code, end.stderr) == (2, "opd-megatron: error: rank 1 alone found the mistake: mend it\n")


def test_a_bug_in_one_rank_keeps_its_traceback_and_ends_the_others(outcome: Outcome) -> None:
    end = outcome("last_rank_crashes")
    assert end.code == 1
    assert "ZeroDivisionError: a bug" in end.stderr
    assert end.stderr.endswith("opd-megatron: rank 1 failed with exit code 1; the other ranks were stopped\n")
    assert "ChildFailedError" not in end.stderr


def test_a_killed_rank_is_named_and_ends_the_others(outcome: Outcome) -> None:
    end = outcome("last_rank_is_killed")
    assert end.code == 128 + signal.SIGKILL
    assert end.stderr == "opd-megatron: rank 1 failed with signal SIGKILL; the other ranks were stopped\n"


def test_cores_are_shared_among_the_ranks_unless_the_user_says_otherwise(outcome: Outcome) -> None:
    end = outcome("prints_threads")
    assert end.code == 0
    assert end.stdout.splitlines() == [f"threads={max(1, available_cores() // 2)} world=2"] * 2


def test_ctrl_c_ends_every_rank_with_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "waits")
    printed = tmp_path / "waits.out"
    deadline = time.monotonic() + 120
    while not (printed.exists() and len(printed.read_text().splitlines()) == 2):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=200)
    end = ended(tmp_path, "waits")
    assert (end.code, end.stderr) == (130, "opd-megatron: interrupted\n")
    for line in end.stdout.splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[-1]), 0)


@pytest.mark.usefixtures("plain")
def test_only_rank_0_prints_and_every_rank_leaves_its_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> int:
        raise ConfigError("steps=0 must be positive: raise it")

    for rank, printed in (("0", "opd-megatron: error: steps=0 must be positive: raise it\n"), ("1", "")):
        as_launched(monkeypatch, 2, int(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank))
        assert run_command(refuse) == 2
        assert capsys.readouterr().err == printed
        assert "steps=0 must be positive" in (tmp_path / rank).read_text()


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (
            MissingPathError("no such file 'x': give another"),
            2,
            "opd-megatron: error: no such file 'x': give another\n",
        ),
        (KeyboardInterrupt(), 130, "opd-megatron: interrupted\n"),
    ],
)
def test_what_a_user_can_correct_is_one_line_without_a_traceback(
    raised: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> int:
        raise raised

    assert run_command(body) == code
    assert capsys.readouterr().err == line


@pytest.mark.usefixtures("plain")
def test_an_unexpected_exception_is_not_swallowed() -> None:
    def body() -> int:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_command(body)
