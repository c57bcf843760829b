"""Programs that mean harm: each is contained, in every kind of confinement that this kernel has, and scores 0."""

from __future__ import annotations

import gzip
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_megatron.tasks.sandbox import Limits, confinement, landlock, namespaces, run_program

LIMITS = Limits(seconds=2.5, cpu_seconds=1, memory_bytes=512 * 2**20, file_bytes=2**20, disk_bytes=8 * 2**20)
BEST = confinement()[0]


def _marks(name: str, there: bool) -> list[pytest.MarkDecorator]:
    """The kind that this machine uses is tested always, the other one among the long proofs."""
    if not there:
        return [pytest.mark.skip(reason=f"this kernel does not let us use {name}")]
    return [] if name == BEST else [pytest.mark.long]


KINDS = [
    pytest.param(name, marks=_marks(name, there))
    for name, there in (
        ("namespaces", BEST == "namespaces"), ("landlock", BEST is not None and landlock.version() > 0),
    )
]  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)

HOSTILE = {
    # Each ends without an error, and so would pass, where it has done what it means to do.
    "a connection": "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    "a datagram": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "a look up of a name": "import urllib.request; urllib.request.urlopen('http://example.com', timeout=1)",
    "a unix socket": "import socket; socket.socket(socket.AF_UNIX).bind('here')",
    "a netlink socket": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "a fork by hand": "import ctypes; assert ctypes.CDLL(None).syscall(57) >= 0",
    "a thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "a memory bomb": "x = bytearray(8 << 30)",
    "memory bit by bit": "x = []\nwhile True: x.append(' ' * 10**6)",
    "a loop": "while True: pass",
    "a sleep": "import time; time.sleep(10**6)",
    "a deaf loop": "import signal\nfor n in range(1, 60):\n  try: signal.signal(n, signal.SIG_IGN)\n"
    "  except Exception: pass\nwhile True: pass",
    "a file outside": "open('FOLDER/escaped', 'w').write('x')",
    "a file in /tmp": "open('/tmp/opd-escaped', 'w').write('x')",
    "shared memory": "open('/dev/shm/opd-escaped', 'w').write('x')",
    "the package itself": "open('PACKAGE', 'a').write('# x')",
    "a secret of the environment": "import os; assert os.environ['OPD_SECRET']",
    "a secret in a file": "assert open('FOLDER/secret').read()",
    "the parent's environment": "import os; assert open(f'/proc/{os.getppid()}/environ').read()",
    "every environment": "import glob; assert any(open(p,'rb').read() for p in glob.glob('/proc/*/environ'))",
    "the root of a process": "import os; assert os.listdir('/proc/1/root') or os.listdir('/proc/self/root/home')",
    "passwords": "assert open('/etc/passwd').read()",
    "a signal to the parent": "import os; os.kill(os.getppid(), 9)",
    "a signal to the watcher": "import os; os.kill(WATCHER, 9)",
    "a signal to all": "import os; os.kill(-1, 9)",
    "a symbolic link": "import os; os.symlink('/etc/passwd', 'link'); assert open('link').read()",
    "a symbolic link up": "import os; os.symlink('FOLDER', 'up'); open('up/escaped', 'w').write('x')",
    "a hard link": "import os; os.link('FOLDER/secret', 'link'); assert open('link').read()",
    "a walk up": "assert open('../' * 20 + 'FOLDER'.lstrip('/') + '/secret').read()",
    "huge output": "while True: print('x' * 10**6)",
    "a flood of its outcome": "import os\nfor fd in range(3, 64):\n  try:\n    while True: os.write(fd, b'x' * 4096)\n"
    "  except OSError: pass\nos._exit(0)",
    "a forged outcome": "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'{\"problem\": null}')\n"
    "  except OSError: pass\nos._exit(0)",
    "an early exit": "import sys; sys.exit(0)",
    "an early hard exit": "import os; os._exit(0)",
    "ptrace": "import ctypes, os; assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "the memory of another": "import ctypes\nc = ctypes.CDLL(None)\nb = (ctypes.c_void_p * 2)()\n"
    "assert c.process_vm_readv(WATCHER, b, 0, b, 0, 0) == 0",
    "leaked descriptors": "import os\nfound = b''\nfor fd in range(3, 256):\n  try: found += os.pread(fd, 99, 0)\n"
    "  except OSError: pass\nassert b'of a descriptor' in found",
    "a zip bomb in memory": "import zlib\nx = zlib.compress(bytes(2**26), 9)\n"
    "y = [zlib.decompress(x) for _ in range(99)]",
    "a zip bomb on disk": "import gzip, shutil\nopen('a.gz', 'wb').write(BOMB)\n"
    "shutil.copyfileobj(gzip.open('a.gz'), open('a', 'wb'))",
    "many files": "for n in range(10**5): open(str(n), 'wb').write(bytes(2**19))",
    "a large file": "f = open('a', 'wb')\nwhile True: f.write(bytes(2**20)); f.flush()",
    "a shell": "import os; os.execv('/bin/sh', ['sh', '-c', 'exit 0'])",
    "a subprocess": "import subprocess; subprocess.run(['ls'], check=True)",
    "another user": "import os; os.setuid(0)",
    "namespaces of its own": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "a mount": "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/usr', b'tmpfs', 0, None) == 0",
    "a way out of its root": "import os; os.mkdir('x'); os.chroot('x')",
    "higher limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "limits of another": "import resource; resource.prlimit(WATCHER, resource.RLIMIT_NOFILE, (8, 8))",
    "life after its parent": "import ctypes; assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
    "a session of its own": "import os; os.setsid()",
    "a device": "import os; os.mknod('sda', 0o600 | 0o060000, os.makedev(8, 0)); assert open('sda', 'rb').read(1)",
    "the kernel's memory": "assert open('/dev/mem', 'rb').read(1)",
    "endless recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nf()",
    "a null pointer": "import ctypes; ctypes.string_at(0)",
    "bpf": "import ctypes; assert ctypes.CDLL(None).syscall(321, 0, 0, 0) >= 0",
    "io_uring": "import ctypes; assert ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(256)) >= 0",
}  # fmt: skip


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the programs are after: a server, a secret, a process."""
    folder = tmp_path_factory.mktemp("prey")
    (folder / "secret").write_text("of a file")
    server = socket.create_server(("127.0.0.1", 0))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as watcher:
        os.environ["OPD_SECRET"] = "of the environment"
        leaked = os.open(folder / "leak", os.O_CREAT | os.O_RDWR)
        os.write(leaked, b"of a descriptor")
        os.set_inheritable(leaked, True)
        import opd_megatron

        yield {
            "FOLDER": str(folder), "PORT": str(server.getsockname()[1]), "WATCHER": str(watcher.pid),
            "PACKAGE": str(opd_megatron.__file__), "BOMB": repr(gzip.compress(bytes(2**26))),
        }  # fmt: skip
        del os.environ["OPD_SECRET"]
        os.close(leaked)
        assert watcher.poll() is None, "the watcher lives"
        watcher.kill()
    server.close()


@every_kind
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained_and_scores_0(surroundings: dict[str, str], kind: str, name: str) -> None:
    program = HOSTILE[name]
    for word, value in surroundings.items():
        program = program.replace(word, value)
    began = time.monotonic()
    found = run_program(program, LIMITS, kind)  # type: ignore[arg-type]
    assert not found.passed, name
    assert found.problem
    assert time.monotonic() - began < LIMITS.seconds + 3
    folder = Path(surroundings["FOLDER"])
    assert sorted(path.name for path in folder.iterdir()) == ["leak", "secret"]
    assert not Path("/tmp/opd-escaped").exists()
    assert not Path("/dev/shm/opd-escaped").exists()


def test_nothing_of_them_is_left() -> None:
    time.sleep(0.5)
    orphans = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_one = b"sandbox/inside.py" in (path / "cmdline").read_bytes()
            if is_one and "\nPPid:\t1\n" in (path / "status").read_text():
                orphans.append(path.name)
        except OSError:
            continue
    assert not orphans


@every_kind
def test_an_honest_program_has_what_it_needs(kind: str) -> None:
    program = """
import collections, dataclasses, datetime, functools, heapq, itertools, json, math, os, random, re, string, tempfile
import threading, typing, unittest, zoneinfo
import numpy
assert numpy.arange(4).sum() == 6
with open("notes.txt", "w") as file:
    file.write("x" * 1000)
assert os.path.getsize("notes.txt") == 1000
with tempfile.TemporaryDirectory() as folder:
    assert os.listdir(folder) == []
assert sorted(os.listdir(".")) == ["notes.txt"]
thread = threading.Thread(target=lambda: None)
thread.start()
thread.join()
assert random.random() < 1
print("whatever")
"""
    found = run_program(program, LIMITS, kind)  # type: ignore[arg-type]
    assert found.passed, found.problem


@every_kind
def test_what_a_program_raises_is_told(kind: str) -> None:
    assert run_program("assert 1 == 2, 'no'", LIMITS, kind).problem == "AssertionError: no"  # type: ignore[arg-type]
    assert run_program("def f(:", LIMITS, kind).problem.startswith("SyntaxError")  # type: ignore[arg-type]
    assert run_program("while True: pass", LIMITS, kind).problem.startswith("timeout")  # type: ignore[arg-type]


def test_programs_do_not_outlive_who_judges_them() -> None:
    code = (
        "from opd_megatron.tasks.sandbox import run_program, Limits\n"
        "run_program('import time; time.sleep(600)', Limits(seconds=600))"
    )
    judge = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 30
    while not (children := _children(judge.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children
    judge.kill()
    judge.wait()
    while any(Path(f"/proc/{child}").exists() and not _is_zombie(child) for child in children):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_doctor_says_how_programs_are_confined() -> None:
    from opd_megatron.doctor import examine

    (finding,) = [each for each in examine() if each.name == "sandbox"]
    assert finding.detail == confinement()[1]
    assert ("namespaces" in finding.detail) == (confinement()[0] == "namespaces")


def test_a_machine_without_confinement_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from opd_megatron.tasks.sandbox import SandboxError

    monkeypatch.setattr(namespaces, "available", lambda: False)
    monkeypatch.setattr(landlock, "version", lambda: 0)
    confinement.cache_clear()
    try:
        with pytest.raises(SandboxError, match="no program of a model's is run here: user namespaces are not allowed"):
            run_program("pass")
    finally:
        confinement.cache_clear()
