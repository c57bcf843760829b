"""One rank of a machine does the work, the others get its result or its error; nobody waits for nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd_megatron.system.once_a_node import once_a_node

ROOT = Path(__file__).parents[2]

WHOLE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}

RANK = """
import os, sys, time
from pathlib import Path
from opd_megatron.errors import DataError
from opd_megatron.system.once_a_node import once_a_node

done = Path(sys.argv[1])
rank = os.environ["LOCAL_RANK"]

def work(what):
    with done.open("a") as log:
        log.write(f"{what} by {rank}\\n")
    time.sleep(0.3)
    if what == "refused":
        raise DataError("the data set has no rows: give one that has some")
    if what == "bug":
        raise KeyError("a bug")
    return (lambda: what) if what == "unpicklable" else [what] * 3

for what in sys.argv[2:]:
    try:
        found = once_a_node(what.partition("#")[0], lambda: work(what))
        print(what, found() if callable(found) else found)
    except Exception as error:
        print(what, type(error).__name__, error)
"""


def ranks(tmp_path: Path, count: int, *works: str, first_late: bool = False) -> tuple[list[list[str]], list[str]]:
    """What each of `count` ranks printed, and who did the work."""
    log = tmp_path / "log"
    log.touch()
    started = []
    for rank in reversed(range(count)):  # the first one comes last
        if rank == 0 and first_late:
            time.sleep(1.5)
        environment = os.environ | {
            **WHOLE, "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path),
        }  # fmt: skip
        words = [sys.executable, "-c", RANK, str(log), *works]
        started.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=60)[0].splitlines() for process in reversed(started)]
    assert all(process.returncode == 0 for process in started)
    return said, log.read_text().splitlines()


def test_one_rank_works_and_all_have_the_result(tmp_path: Path) -> None:
    said, log = ranks(tmp_path, 3, "rows", "more", first_late=True)
    assert log == ["rows by 0", "more by 0"]
    assert said == [["rows ['rows', 'rows', 'rows']", "more ['more', 'more', 'more']"]] * 3


def test_the_same_work_can_be_done_again_with_another_result(tmp_path: Path) -> None:
    said, log = ranks(tmp_path, 2, "rows#1", "rows#2")
    assert log == ["rows#1 by 0", "rows#2 by 0"]
    assert said == [["rows#1 ['rows#1', 'rows#1', 'rows#1']", "rows#2 ['rows#2', 'rows#2', 'rows#2']"]] * 2


def test_a_users_mistake_is_every_ranks_error_and_is_met_once(tmp_path: Path) -> None:
    said, log = ranks(tmp_path, 3, "refused")
    assert log == ["refused by 0"]
    assert said == [["refused DataError the data set has no rows: give one that has some"]] * 3


def test_what_cannot_be_handed_over_each_rank_does_itself(tmp_path: Path) -> None:
    said, log = ranks(tmp_path, 2, "unpicklable", "bug")
    assert sorted(log) == ["bug by 0", "bug by 1", "unpicklable by 0", "unpicklable by 1"]
    assert said == [["unpicklable unpicklable", "bug KeyError 'a bug'"]] * 2


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    ranks(tmp_path, 3, "rows", "refused")
    folders = list(tmp_path.glob("opd-megatron-*"))
    assert [list(folder.iterdir()) for folder in folders] in ([], [[]])


@pytest.mark.parametrize("left_behind", [{}, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}])
def test_a_process_that_is_no_rank_works_alone(monkeypatch: pytest.MonkeyPatch, left_behind: dict[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left_behind.items():
        monkeypatch.setenv(name, value)
    assert once_a_node("rows", lambda: 3) == 3


def test_a_rank_whose_launcher_is_gone_does_not_wait_for_ever(tmp_path: Path) -> None:
    starter = (
        "import os, subprocess, sys\n"
        f"environment = os.environ | {WHOLE | {'RANK': '1', 'WORLD_SIZE': '2'}}\n"
        "environment |= {'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '2'}\n"
        f"p = subprocess.Popen([sys.executable, '-c', {RANK!r}, {str(tmp_path / 'log')!r}, 'rows'], env=environment)\n"
        "print(p.pid, flush=True)\n"
        "import time; time.sleep(1.5)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", starter], env=environment, capture_output=True, text=True, timeout=60, check=True
    )  # it returns when the rank has closed the pipe too
    assert "RuntimeError the launcher of this rank is gone" in done.stdout
