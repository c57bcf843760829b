"""Folders that a killed process leaves are removed by the next; those in use are not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from opd_megatron.system.held_folders import HeldFolder

_HOLD = """
import sys, time
from opd_megatron.system.held_folders import HeldFolder
folder = HeldFolder("kind-", sys.argv[1])
(folder.path / "weights").write_bytes(b"x")
print(folder.path, flush=True)
time.sleep(60)
"""


def test_a_folder_goes_when_it_is_removed(tmp_path: Path) -> None:
    folder = HeldFolder("kind-", str(tmp_path))
    (folder.path / "weights").write_bytes(b"x")
    folder.remove()
    folder.remove()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    mine = HeldFolder("kind-", str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        HeldFolder("kind-", str(tmp_path)).remove()
        assert (theirs / "weights").exists()
    finally:
        other.kill()
        other.wait()
    assert theirs.exists()
    unlocked = tmp_path / "kind-of another program"
    unlocked.mkdir()
    HeldFolder("kind-", str(tmp_path)).remove()
    assert not theirs.exists()
    assert mine.path.exists()
    assert unlocked.exists()
    mine.remove()


def test_a_folder_is_in_use_from_the_moment_it_is_there(tmp_path: Path) -> None:
    script = _HOLD.replace("print(folder.path, flush=True)\ntime.sleep(60)", "assert folder.path.exists()")
    makers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(4)]
    deadline = time.monotonic() + 60
    while any(maker.poll() is None for maker in makers) and time.monotonic() < deadline:
        HeldFolder("kind-", str(tmp_path)).remove()
    assert [maker.wait(60) for maker in makers] == [0] * 4
    assert not list(tmp_path.iterdir())
