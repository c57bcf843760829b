"""One owner of a run directory: a second process is refused, a lock that was left behind is not in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from opd_megatron import cli
from opd_megatron.errors import ConfigError
from opd_megatron.run.lock import LOCK_FILE, RunLock
from tests.cases.inputs import make_pair, refused, train_words

_HOLDER = """
import sys, time
from pathlib import Path
from opd_megatron.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]), pulse=0.1)
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    return process


def test_a_second_run_is_refused_and_the_first_lives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pair(tmp_path)
    (tmp_path / "run").mkdir()
    with holder(tmp_path / "run") as first:
        line = refused(capsys, *train_words(tmp_path))
        assert f"is in use by process {first.pid} on host" in line
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
        first.kill()
    assert cli.main(train_words(tmp_path)) == 0, "a lock of a killed process is taken over at once"
    assert f"took over from process {first.pid}" in capsys.readouterr().out
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_the_lock_of_a_process_that_ended_is_known_by_its_start(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    held = json.loads((tmp_path / LOCK_FILE).read_text())
    lock.release()
    (tmp_path / LOCK_FILE).write_text(json.dumps(held | {"started": "1"}))  # the id has been given to another process
    notes: list[str] = []
    again = RunLock(tmp_path, notes.append)
    again.acquire()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["started"] == held["started"]
    assert len(notes) == 1
    assert "took over" in notes[0]
    again.release()


def test_another_hosts_lock_is_held_while_it_beats(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"host": "node7", "machine": "elsewhere", "pid": 1, "started": "1", "since": "noon"}))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(ConfigError, match="process 1 on host node7 since noon"):
            RunLock(tmp_path, pulse=0.2).acquire()
    finally:
        stop.set()
        heart.join()
    notes: list[str] = []
    began = time.monotonic()
    lock = RunLock(tmp_path, notes.append, pulse=0.2)
    lock.acquire()
    assert time.monotonic() - began < 10
    assert "took over from process 1 on host node7" in notes[-1]
    lock.release()
    assert not path.exists()


def test_a_lock_that_cannot_be_read_belongs_to_somebody_until_it_is_quiet(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("{")
    lock = RunLock(tmp_path, pulse=0.05)
    lock.acquire()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_of_many_who_start_at_once_one_gets_it(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": "gone", "machine": "gone", "pid": 1, "started": "1"}))
    script = _HOLDER.replace("time.sleep(60)", "time.sleep(3)")
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE) for _ in range(4)
    ]
    outcomes = [process.wait(120) == 0 for process in processes]
    assert sum(outcomes) == 1


def test_an_output_dir_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pair(tmp_path)
    assert "cannot be made" in refused(capsys, *train_words(tmp_path, "output_dir=/proc/nowhere/run"))
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, *train_words(tmp_path, f"output_dir={tmp_path / 'file' / 'run'}"))
