"""The engine's process: its end is always noticed, always explained, and nothing of it stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd_megatron.errors import EngineDiedError, RolloutError
from opd_megatron.rollout.child import ChildProcess

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def child(tmp_path):
    child = ChildProcess("tests.rollout.echo_child", ENVIRONMENT, tmp_path / "rollout.log", timeout=20)
    yield child
    child.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_answers_requests_in_order(child):
    assert [child.call("echo", i) for i in range(3)] == [0, 1, 2]


def test_a_refusal_is_an_error_of_the_caller_and_the_child_lives_on(child):
    with pytest.raises(RolloutError, match="no such size"):
        child.call("refuse", "no such size")
    assert child.call("echo", 1) == 1


def test_death_in_the_middle_of_a_call_names_exit_code_and_last_error(child):
    with pytest.raises(EngineDiedError, match=r"exit code 3.*ValueError: out of cheese.*rollout\.log") as caught:
        child.call("die", "out of cheese")
    assert "\n" not in str(caught.value)


def test_a_kill_names_the_signal_and_so_does_every_later_call(child):
    child.call("echo", 0)
    os.kill(child.process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(EngineDiedError, match="exit code -9"):
            child.call("echo", 1)


def test_only_the_log_of_this_start_is_quoted(tmp_path):
    log = tmp_path / "rollout.log"
    log.write_text("RuntimeError: of an earlier start\n")
    child = ChildProcess("tests.rollout.echo_child", ENVIRONMENT, log, timeout=20)
    os.kill(child.process.pid, signal.SIGKILL)
    with pytest.raises(EngineDiedError) as caught:
        child.call("echo", 0)
    assert "earlier" not in str(caught.value)


def test_a_call_that_takes_too_long_ends_the_child(tmp_path):
    child = ChildProcess("tests.rollout.echo_child", ENVIRONMENT, tmp_path / "rollout.log", timeout=1)
    with pytest.raises(EngineDiedError, match=r"'hang' within rollout.request_timeout=1 s"):
        child.call("hang", None)
    assert not is_running(child.process.pid)


def test_a_child_that_says_how_far_it_is_may_take_longer_than_one_that_is_silent(tmp_path):
    child = ChildProcess("tests.rollout.echo_child", ENVIRONMENT, tmp_path / "rollout.log", timeout=30)
    child.call("echo", 0)  # it has started
    child._timeout = 2
    assert child.call("slow", 6) == 6
    assert child.progress == (5, 6)
    with pytest.raises(EngineDiedError, match=r"went no further in 'stall' for rollout.request_timeout=2 s"):
        child.call("stall", None)


def test_a_start_has_a_time_of_its_own(tmp_path):
    child = ChildProcess("tests.rollout.echo_child", ENVIRONMENT, tmp_path / "rollout.log", timeout=60, start_timeout=1)
    with pytest.raises(EngineDiedError, match=r"'start' within rollout.startup_timeout=1 s"):
        child.call("start", "forever")


def test_a_stop_signal_gives_up_a_start_at_once_and_ends_the_child(tmp_path):
    script = (
        "import os; from pathlib import Path; from opd_megatron.system import signals\n"
        "from opd_megatron.errors import StopRequestedError; from opd_megatron.rollout.child import ChildProcess\n"
        "signals.note_stop_signals()\n"
        f"c = ChildProcess('tests.rollout.echo_child', os.environ, Path({str(tmp_path / 'log')!r}), 60)\n"
        "c.call('echo', 0); print('starting', c.process.pid, flush=True)\n"
        "try: c.call('start', 'forever')\n"
        "except StopRequestedError: print('given up', c.process.poll())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    engine = int(process.stdout.readline().split()[-1])
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[0] == "given up -9\n"
    assert process.returncode == 0
    assert not is_running(engine)


def test_close_ends_the_child_and_can_be_repeated(child):
    child.call("echo", 0)
    child.close()
    child.close()
    assert not is_running(child.process.pid)


def test_a_parent_that_exits_without_closing_leaves_no_child(tmp_path):
    script = (
        "import os; from pathlib import Path; from opd_megatron.rollout.child import ChildProcess\n"
        f"c = ChildProcess('tests.rollout.echo_child', os.environ, Path({str(tmp_path / 'log')!r}), 20)\n"
        "c.call('echo', 0); c.send('hang', None); print(c.process.pid)"
    )
    result = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    deadline = time.monotonic() + 10
    while is_running(int(result.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(result.stdout))
