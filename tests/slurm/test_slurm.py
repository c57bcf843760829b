"""launch/slurm.sbatch on a real cluster of two nodes: its jobs train, stop, come back, and say what went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd_megatron.mcore.checkpoint import list_checkpoints
from opd_megatron.metrics import read_metrics
from tests.e2e.runs import make_inputs
from tests.e2e.test_interruptions import ROOT, config_file
from tests.slurm.cluster import Cluster, cluster, missing

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
SCRIPT = str(ROOT / "launch/slurm.sbatch")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def _submit(nodes: Cluster, config: Path, count: int = 2, ranks: int = 1) -> int:
    """From the configuration's folder, which holds nothing else."""
    return nodes.submit(f"--nodes={count}", SCRIPT, config.name, cwd=config.parent, NPROC_PER_NODE=str(ranks))


def _log(folder: Path, job: int) -> str:
    path = folder / f"slurm-{job}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def _wait_for_step(nodes: Cluster, run: Path, job: int, step: int, folder: Path) -> None:
    until = time.monotonic() + 180
    while _reached(run) < step:
        assert time.monotonic() < until, _log(folder, job)[-3000:]
        assert nodes.show(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), _log(folder, job)[-3000:]
        time.sleep(0.1)


def _reached(run: Path) -> int:
    rows = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    return int(rows[-1]["step"]) if rows else -1


def _losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(nodes: Cluster, inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_nodes")
    job = _submit(nodes, config_file(inputs, folder / "run", **_settings()))
    nodes.wait(job, "COMPLETED", "FAILED", seconds=240)
    assert nodes.show(job)["JobState"] == "COMPLETED", _log(folder, job)[-3000:]
    assert nodes.show(job)["NumNodes"] == "2"
    return folder / "run"


def _settings(**more: Any) -> dict[str, Any]:
    return {"steps": 12, "checkpoint.every": 4, "evaluation.every": 0, "parallel.data": 2} | more


def _comes_back(nodes: Cluster, job: int, folder: Path, uninterrupted: Path) -> None:
    """Starts a requeued job again, which ends as a run does that nothing stopped, bit for bit."""
    nodes.start_again(job)
    nodes.wait(job, "COMPLETED", "FAILED", seconds=240)
    known = nodes.show(job)
    assert (known["JobState"], known["Restarts"]) == ("COMPLETED", "1"), _log(folder, job)[-3000:]
    assert _losses(folder / "run") == _losses(uninterrupted)
    found, expected = _weights(folder / "run"), _weights(uninterrupted)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_two_nodes_train_as_one_does(
    nodes: Cluster, inputs: dict[str, str], uninterrupted: Path, tmp_path: Path
) -> None:
    config = config_file(inputs, tmp_path / "run", **_settings())
    job = _submit(nodes, config, count=1, ranks=2)
    nodes.wait(job, "COMPLETED", "FAILED", seconds=240)
    assert nodes.show(job)["JobState"] == "COMPLETED", _log(tmp_path, job)[-3000:]
    assert _losses(tmp_path / "run") == pytest.approx(_losses(uninterrupted), rel=1e-6)
    assert len(_losses(uninterrupted)) == 12


@pytest.mark.parametrize("how", ["USR1 to the script", "TERM to the tasks", "preempted"])
def test_a_job_that_is_stopped_comes_back_and_ends_with_the_same_weights(
    nodes: Cluster, inputs: dict[str, str], uninterrupted: Path, tmp_path: Path, how: str
) -> None:
    job = _submit(nodes, config_file(inputs, tmp_path / "run", **_settings()))
    _wait_for_step(nodes, tmp_path / "run", job, 2, tmp_path)
    other = None
    if how == "preempted":
        other = nodes.submit("--nodes=2", "--partition=high", "--exclusive", "--wrap=sleep 1", cwd=tmp_path)
    elif how == "USR1 to the script":
        nodes.run("scancel", "--batch", "--signal=USR1", str(job))
    else:
        nodes.run("scancel", "--signal=TERM", str(job))
    nodes.wait(job, "PENDING", seconds=120)
    assert "requeueing job" in _log(tmp_path, job)
    stopped_at = list_checkpoints(tmp_path / "run" / "checkpoints")[-1][0]
    assert 2 <= stopped_at < 12
    if other is not None:
        nodes.wait(other, "COMPLETED")
    _comes_back(nodes, job, tmp_path, uninterrupted)


def test_a_node_that_dies_ends_the_job_and_the_requeued_one_resumes(
    nodes: Cluster, inputs: dict[str, str], uninterrupted: Path, tmp_path: Path
) -> None:
    job = _submit(nodes, config_file(inputs, tmp_path / "run", **_settings()))
    _wait_for_step(nodes, tmp_path / "run", job, 5, tmp_path)
    nodes.kill_node("n2")
    nodes.wait(job, "PENDING", seconds=120)
    assert "does not answer: requeueing job" in _log(tmp_path, job)
    assert "opd-megatron: rank 0 failed" in _log(tmp_path, job)
    nodes.start_node("n2")
    nodes.wait_for_nodes()
    _comes_back(nodes, job, tmp_path, uninterrupted)


def test_engines_on_a_node_of_their_own_teach_the_same(nodes: Cluster, inputs: dict[str, str], tmp_path: Path) -> None:
    own = {"rollout.placement": "own", "rollout.hosts": 1, "parallel.data": 1}
    for name, settings, count in (("one", {"parallel.data": 1}, 1), ("own", own, 2)):
        folder = tmp_path / name
        folder.mkdir()
        config = config_file(inputs, folder / "run", **_settings(**settings))
        job = _submit(nodes, config, count)
        nodes.wait(job, "COMPLETED", "FAILED", seconds=240)
        assert nodes.show(job)["JobState"] == "COMPLETED", _log(folder, job)[-3000:]
    assert _losses(tmp_path / "own" / "run") == pytest.approx(_losses(tmp_path / "one" / "run"), rel=1e-6)


def test_a_users_mistake_fails_the_job_with_one_line_and_is_not_tried_again(
    nodes: Cluster, inputs: dict[str, str], tmp_path: Path
) -> None:
    config = config_file(inputs, tmp_path / "run", **_settings(**{"parallel.data": 4}))
    job = _submit(nodes, config)
    known = nodes.wait(job, "COMPLETED", "FAILED", seconds=120)
    assert known["JobState"] == "FAILED"
    assert known["Restarts"] == "0"
    said = [line for line in _log(tmp_path, job).splitlines() if "opd-megatron" in line]
    assert "world size 2 must equal" in said[0]
    assert "Traceback" not in _log(tmp_path, job)
