"""launch/torchrun.sh and launch/slurm.sbatch as a cluster starts and stops them; srun and scontrol are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.mcore.checkpoint import list_checkpoints
from opd_megatron.metrics import read_metrics
from tests.e2e.runs import make_inputs
from tests.e2e.test_interruptions import ROOT, config_file, environment, wait_for_step

SRUN = """#!/usr/bin/env bash
# Starts the task of one node in its own place, so that a signal to srun is a signal to the task.
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo node0; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def _start(script: str, config: Path, **variables: str) -> subprocess.Popen[str]:
    here = Path(sys.executable).parent  # where the checkout has no .venv
    variables = environment() | {"NPROC_PER_NODE": "2", "PATH": f"{here}:{os.environ['PATH']}"} | variables
    return subprocess.Popen(
        ["bash", f"launch/{script}", str(config)], env=variables, cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_a_job_near_its_time_limit_saves_and_is_requeued(inputs: dict[str, str], tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run, log = tmp_path / "run", tmp_path / "scontrol.log"
    settings: dict[str, Any] = {"steps": 100_000, "checkpoint.every": 0, "evaluation.every": 0, "parallel.data": 2}
    process = _start(
        "slurm.sbatch", config_file(inputs, run, **settings), SCONTROL_LOG=str(log), SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="node0", SLURM_SUBMIT_DIR=str(ROOT),
        PATH=f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    )  # fmt: skip
    wait_for_step(process, run, 2)
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert list_checkpoints(run / "checkpoints")[-1][0] == read_metrics(run)[-1]["step"] >= 2
    assert "requeueing job 7" in output
    assert log.read_text() == "requeue 7\n"


def test_a_users_mistake_is_one_line_from_torchrun_sh_too(inputs: dict[str, str], tmp_path: Path) -> None:
    process = _start("torchrun.sh", config_file(inputs, tmp_path / "run", **{"parallel.data": 4}))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.count("\n") == 1, errors
    assert "world size 2 must equal" in errors
