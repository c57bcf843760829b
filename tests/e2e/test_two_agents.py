"""Two machines imitated by two agents of launch/torchrun.sh on this one: what one does, the other hears of."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.mcore.checkpoint import list_checkpoints
from opd_megatron.metrics import read_metrics
from tests.e2e.runs import make_inputs
from tests.e2e.test_interruptions import ROOT, _family_of, _is_running, config_file, environment, wait_for_step

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
ENDLESS: dict[str, Any] = {"steps": 100_000, "checkpoint.every": 1, "evaluation.every": 0, "parallel.data": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def _agents(
    config: Path,
    *,
    addresses: tuple[str, str] = ("localhost", "localhost"),
    folders: tuple[Path, Path] = (ROOT, ROOT),
    **more: str,
) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(sys.executable).parent
    common = environment() | {"NPROC_PER_NODE": "1", "NNODES": "2", "MASTER_PORT": port}
    common["PATH"] = f"{here}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "launch/torchrun.sh"), str(config)]
    own = [{"NODE_RANK": str(rank), "MASTER_ADDR": addresses[rank]} for rank in (0, 1)]
    return [
        subprocess.Popen(
            command, cwd=folders[rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=common | own[rank] | more,
        )
        for rank in (0, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("told", [0, 1])
def test_a_stop_signal_to_one_agent_saves_and_ends_both(inputs: dict[str, str], tmp_path: Path, told: int) -> None:
    run = tmp_path / "run"
    agents = _agents(config_file(inputs, run, **ENDLESS))
    wait_for_step(agents[0], run, 2)
    agents[told].send_signal(signal.SIGTERM)
    ends = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    assert list_checkpoints(run / "checkpoints")[-1][0] == read_metrics(run)[-1]["step"]


@pytest.mark.parametrize("dies", [0, 1])
def test_when_one_machine_dies_the_other_ends_with_one_line_and_the_run_goes_on_later(
    inputs: dict[str, str], tmp_path: Path, dies: int
) -> None:
    run = tmp_path / "run"
    agents = _agents(config_file(inputs, run, **ENDLESS))
    wait_for_step(agents[0], run, 4)  # by then files of the first are whole: they are written while training goes on
    families = [_family_of(agent.pid) for agent in agents]
    began = time.monotonic()
    for pid in families[dies]:
        os.kill(pid, signal.SIGKILL)
    _, errors = agents[1 - dies].communicate(timeout=180)
    assert time.monotonic() - began < 120
    assert agents[1 - dies].returncode not in (0, None)
    lines = [line for line in errors.splitlines() if line.startswith("opd-megatron:")]
    assert len(lines) == 1, errors[-3000:]
    assert not any(_is_running(pid) for pid in families[1 - dies])

    reached = list_checkpoints(run / "checkpoints")[-1][0]
    agents = _agents(config_file(inputs, run, **ENDLESS))
    wait_for_step(agents[0], run, reached + 3)  # the step after the checkpoint may be in the log already
    agents[0].send_signal(signal.SIGTERM)
    for agent in agents:
        agent.communicate(timeout=120)
        assert agent.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_an_agent_that_waits_for_the_other_machine_stops_when_it_is_told(
    inputs: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    config = config_file(inputs, tmp_path / "run", **ENDLESS)
    agents = _agents(config, OPD_MEGATRON_STOPPED_FILE=str(tmp_path / "stopped"))
    agents[0].kill()
    agents[0].communicate()
    time.sleep(8)
    agents[1].send_signal(number)
    _, errors = agents[1].communicate(timeout=30)
    assert agents[1].returncode == 0
    assert "stopped before its ranks had started" in errors
    assert (tmp_path / "stopped").exists(), "a job script would put it into the queue again"


@pytest.mark.parametrize("missing", [0, 1])
def test_a_machine_that_never_comes_is_one_line(inputs: dict[str, str], tmp_path: Path, missing: int) -> None:
    agents = _agents(config_file(inputs, tmp_path / "run", **ENDLESS), START_TIMEOUT="5")
    agents[missing].kill()
    agents[missing].communicate()
    _, errors = agents[1 - missing].communicate(timeout=60)
    assert agents[1 - missing].returncode == 1, "no mistake of the user's: a job script tries again"
    assert errors.count("\n") == 1, errors
    assert f"error: machine {1 - missing} of 2 did not meet the others at localhost:" in errors
    assert errors.strip().endswith("START_TIMEOUT is the seconds that one waits")


def test_a_run_directory_that_is_not_the_same_everywhere_is_one_line(inputs: dict[str, str], tmp_path: Path) -> None:
    config = config_file(inputs, tmp_path / "run", **ENDLESS)
    config.write_text(config.read_text().replace(f"output_dir: {tmp_path / 'run'}", "output_dir: run"))
    folders = tmp_path / "node0", tmp_path / "node1"
    for folder in folders:
        folder.mkdir()
    agents = _agents(config, folders=folders)
    ends = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [2, 2]
    for _, errors in ends:
        lines = [line for line in errors.splitlines() if line.startswith("opd-megatron:")]
        assert len(lines) == 1, errors
        assert "output_dir='run' is not one folder for all machines" in lines[0]
        assert str(folders[1] / "run") in lines[0]


def test_a_name_that_means_nothing_is_one_line_at_once(inputs: dict[str, str], tmp_path: Path) -> None:
    config = config_file(inputs, tmp_path / "run", **ENDLESS)
    agents = _agents(config, addresses=("no-such-host.invalid", "no-such-host.invalid"))
    for agent in agents:
        _, errors = agent.communicate(timeout=60)
        assert agent.returncode == 2
        assert errors.count("\n") == 1, errors
        assert "MASTER_ADDR='no-such-host.invalid' has no address" in errors
