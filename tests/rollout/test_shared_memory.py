"""What a killed engine leaves in /dev/shm is removed, at once or at the next start, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from opd_megatron.errors import EngineDiedError
from opd_megatron.rollout.child import ChildProcess
from opd_megatron.rollout.shared_memory import SharedMemoryOf

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def child(tmp_path: Path):
    child = ChildProcess("tests.rollout.echo_child", ENVIRONMENT, tmp_path / "rollout.log", timeout=60)
    yield child
    child.close()


def _start(child: ChildProcess) -> list[Path]:
    """Files of the child and of a process that it started."""
    files = [Path("/dev/shm", name) for name in child.call("start", None)]
    assert len(files) == 2
    assert all(file.exists() for file in files)
    return files


def test_it_goes_when_the_engine_was_killed(child: ChildProcess) -> None:
    files = _start(child)
    other = shared_memory.SharedMemory(create=True, size=16)
    os.killpg(child.process.pid, signal.SIGKILL)
    with pytest.raises(EngineDiedError):
        child.call("echo", 1)
    assert not any(file.exists() for file in files)
    assert Path("/dev/shm", other.name).exists()
    other.close()
    other.unlink()


def test_it_goes_when_the_engine_is_closed(child: ChildProcess, tmp_path: Path) -> None:
    files = _start(child)
    child.close(grace=0)
    assert not any(file.exists() for file in files)
    assert not list(tmp_path.glob(".*")), "the note goes too"


_TRAINER = """
import os, signal, sys
from pathlib import Path
from opd_megatron.rollout.child import ChildProcess
child = ChildProcess("tests.rollout.echo_child", os.environ, Path(sys.argv[1]), 60)
print(*child.call("start", None), child.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_goes_at_the_next_start_when_the_trainer_was_killed_too(tmp_path: Path) -> None:
    log = tmp_path / "rollout.log"
    trainer = subprocess.run(
        [sys.executable, "-c", _TRAINER, str(log)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    *names, pid = trainer.stdout.split()
    os.killpg(int(pid), signal.SIGKILL)
    files = [Path("/dev/shm", name) for name in names]
    assert len(files) == 2
    assert all(file.exists() for file in files)
    ChildProcess("tests.rollout.echo_child", ENVIRONMENT, log, timeout=60).close(grace=0)
    assert not any(file.exists() for file in files)


def test_a_damaged_note_removes_nothing_but_shared_memory(tmp_path: Path) -> None:
    precious, note = tmp_path / "precious", tmp_path / "note"
    precious.write_text("x")
    note.write_text(f"{precious}\n/dev/shm/../..{precious}\n/dev/shm\n\0\n")
    SharedMemoryOf(note)
    assert precious.exists()
    assert Path("/dev/shm").is_dir()
    assert not note.exists()
