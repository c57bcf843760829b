"""A run that is killed, or asked to stop, at any moment goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.config import dump_config
from opd_megatron.mcore.checkpoint import list_checkpoints
from opd_megatron.metrics import read_metrics
from tests.e2e.runs import make_inputs, small_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def config_file(inputs: dict[str, str], run: Path, **overrides: Any) -> Path:
    path = run.with_suffix(".yaml")
    path.write_text(dump_config(small_config(inputs, run, **overrides)))
    return path


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _live(config: Path, kills: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.e2e.lives", str(config), str(kills), "7"]
    result = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_killed_at_20_moments_the_run_ends_with_the_weights_of_an_uninterrupted_one(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    settings = {
        "steps": 100, "checkpoint.every": 2, "rollout.max_new_tokens": 2, "rollout.prompts_per_step": 2,
        "evaluation.every": 20, "evaluation.prompts": 2, "logging.sample_every": 0,
    }  # fmt: skip
    _live(config_file(inputs, tmp_path / "whole", **settings), kills=0)
    survived = _live(config_file(inputs, tmp_path / "killed", **settings), kills=20)
    assert survived["killed"] == 20
    assert survived["during_saves"] >= 5

    whole, killed = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    rows = [read_metrics(tmp_path / name) for name in ("whole", "killed")]
    assert [row["step"] for row in rows[1]] == list(range(101))
    for a, b in zip(*rows, strict=True):
        assert (a.get("loss"), a.get("lr"), a.get("eval/nll")) == (b.get("loss"), b.get("lr"), b.get("eval/nll"))
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == ["latest", "step_00000098", "step_00000100"]


def _start(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "opd_megatron.train", str(config)]
    return subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(row["step"] >= step for row in read_metrics(run)):
            return
        time.sleep(0.02)
    pytest.fail(f"the run did not reach step {step}: {process.communicate(timeout=10)[1][-3000:]}")


def _ranks_of(launcher: int) -> list[int]:
    lists = [path.read_text().split() for path in Path(f"/proc/{launcher}/task").glob("*/children")]
    return [int(pid) for pids in lists for pid in pids]


def _is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_stop_signal_to_the_launcher_or_to_one_rank_saves_the_current_step_and_exits_0(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = config_file(
        inputs, run, **{"steps": 100_000, "checkpoint.every": 0, "evaluation.every": 0, "parallel.data": 2}
    )
    reached = 0
    for number, to_launcher in ((signal.SIGUSR1, True), (signal.SIGTERM, False)):
        process = _start(config)
        wait_for_step(process, run, reached + 2)
        ranks = _ranks_of(process.pid)
        assert len(ranks) >= 2
        os.kill(process.pid if to_launcher else ranks[-1], number)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        assert not any(_is_running(pid) for pid in ranks)
        steps = [row["step"] for row in read_metrics(run)]
        assert steps == list(range(len(steps))), "each step once, across the interruption"
        assert steps[-1] > reached
        reached = steps[-1]
        assert list_checkpoints(run / "checkpoints")[-1][0] == reached
        assert (run / "checkpoints" / "latest").read_text() == f"step_{reached:08d}\n"
        assert not (run / "hf").exists(), "the run is not finished"


def _rank_of(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        variables = dict(item.partition("=")[::2] for item in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        return variables.get("RANK")
    return None


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_host_of_engines_that_dies_ends_the_run_with_one_line_and_a_stop_signal_ends_both_places(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {"rollout.placement": "own", "rollout.hosts": 1, "rollout.engines": 2, "rollout.steps_ahead": 1}
    config = config_file(inputs, run, **{"steps": 100_000, "checkpoint.every": 1, "evaluation.every": 0, **settings})
    process = _start(config)
    wait_for_step(process, run, 2)
    ranks = _ranks_of(process.pid)
    (host,) = (pid for pid in ranks if _rank_of(pid) == "1")
    os.kill(host, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = [line for line in errors.splitlines() if line.startswith("opd-megatron:")]
    assert "rank 1 failed with signal SIGKILL" in line
    assert not any(_is_running(pid) for pid in ranks)

    reached = list_checkpoints(run / "checkpoints")[-1][0]
    process = _start(config)
    wait_for_step(process, run, reached + 2)
    ranks = _ranks_of(process.pid)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    assert not any(_is_running(pid) for pid in ranks)
    steps = [row["step"] for row in read_metrics(run)]
    assert steps == list(range(len(steps)))
    assert steps[-1] >= reached + 2


def _family_of(pid: int) -> list[int]:
    """The process and everything that it has started."""
    return [pid, *(member for child in _ranks_of(pid) for member in _family_of(child))]


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_signal_to_every_process_while_vllm_samples_costs_neither_the_step_nor_the_engine(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    """A preempting scheduler does not choose: the engine's processes get it too."""
    run = tmp_path / "run"
    settings = {"steps": 100_000, "checkpoint.every": 0, "evaluation.every": 0, "rollout.engine": "vllm"}
    process = _start(config_file(inputs, run, **settings, **{"rollout.max_new_tokens": 300}))
    wait_for_step(process, run, 2)
    time.sleep(0.5)  # sampling is nearly all of a step
    family = _family_of(process.pid)
    assert any("vllm_server" in Path(f"/proc/{pid}/cmdline").read_text() for pid in family)
    for pid in family:
        os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    assert "restarting" not in errors
    assert list_checkpoints(run / "checkpoints")[-1][0] == read_metrics(run)[-1]["step"] >= 3
    assert not any(_is_running(pid) for pid in family)


SECOND_SIGNAL = """
import os, signal, time
from opd_megatron.system import signals
signals.SAME_REQUEST_SECONDS = 0.2
signals.note_stop_signals()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
assert signals.stop_requested()
print("the same request twice is one", flush=True)
time.sleep(0.5)
try:
    os.kill(os.getpid(), signal.SIGUSR1)
finally:
    print("unwound", flush=True)
print("not reached")
"""


def test_a_second_request_ends_the_process_at_once() -> None:
    result = subprocess.run([sys.executable, "-c", SECOND_SIGNAL], env=environment(), capture_output=True, text=True)
    assert result.returncode == 128 + signal.SIGUSR1
    assert result.stdout.splitlines() == ["the same request twice is one", "unwound"]
