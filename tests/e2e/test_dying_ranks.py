"""A rank is killed in every phase of a step and at every point of a save: the run ends with one line, nothing of it
stays, and the same command goes on to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.mcore.checkpoint import list_checkpoints
from tests.e2e.dying import MOMENTS
from tests.e2e.runs import make_inputs
from tests.e2e.test_interruptions import ROOT, config_file, environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
SETTINGS = {"steps": 5, "checkpoint.every": 1, "checkpoint.keep": 2, "evaluation.every": 1, "parallel.data": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def run(config: Path, moment: str, rank: int) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "opd_megatron.command.agent", "--standalone", "--nproc-per-node", "2", "-m",
        "tests.e2e.dying", moment, str(rank), str(config),
    ]  # fmt: skip
    # All of it is one session, which is looked through for what is left.
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=120)
    finally:
        left = members_of(process.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert left == []
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def members_of(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(config_file(inputs, folder, **SETTINGS), "never", 0).returncode == 0
    return weights(folder)


@pytest.mark.parametrize(
    ("moment", "rank"),
    [
        *((moment, 1) for moment in ("rollout", "teacher", "train", "sync", "evaluate")),
        *((moment, 1) for moment in MOMENTS if moment not in ("evaluate", "publish")),
        ("rollout", 0), ("train", 0), ("writing", 0), ("publish", 0),
    ],
)  # fmt: skip
def test_a_rank_that_is_killed_ends_the_run_with_one_line_and_it_goes_on(
    inputs: dict[str, str], tmp_path: Path, whole: dict[str, torch.Tensor], moment: str, rank: int
) -> None:
    folder = tmp_path / "run"
    config = config_file(inputs, folder, **SETTINGS)
    began = time.monotonic()
    done = run(config, moment, rank)
    assert time.monotonic() - began < 60
    lines = [line for line in done.stderr.splitlines() if line.startswith("opd-megatron:")]
    assert lines == [f"opd-megatron: rank {rank} failed with signal SIGKILL; the other ranks were stopped"]
    assert done.returncode == 128 + signal.SIGKILL
    assert 1 <= list_checkpoints(folder / "checkpoints")[-1][0] <= 4

    assert run(config, "never", 0).returncode == 0
    assert [step for step, _ in list_checkpoints(folder / "checkpoints")] == [4, 5]
    found = weights(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
