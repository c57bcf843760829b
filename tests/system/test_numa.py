"""Ranks stay on the cores near their GPU, where the machine says which those are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_megatron.system.numa import cores_near

GPU = "0000:3b:00.0"
ROOT = Path(__file__).parents[2]


def machine(folder: Path, node: int, cores: str) -> Path:
    device, numa = folder / "bus/pci/devices" / GPU, folder / f"devices/system/node/node{node}"
    device.mkdir(parents=True)
    numa.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    (numa / "cpulist").write_text(f"{cores}\n")
    return folder


@pytest.mark.parametrize(
    ("node", "cores", "expected"),
    [(1, "0-2,8", {0, 1, 2, 8}), (0, "5", {5}), (-1, "0-3", set()), (0, "", set()), (0, "many", set())],
)
def test_the_cores_of_a_gpus_node_are_read(tmp_path: Path, node: int, cores: str, expected: set[int]) -> None:
    assert cores_near(GPU, machine(tmp_path, node, cores)) == expected


def test_a_machine_that_says_nothing_has_no_near_cores(tmp_path: Path) -> None:
    assert cores_near(GPU, tmp_path) == set()


SCRIPT = """
import os, sys, threading
from pathlib import Path
from opd_megatron.system.numa import stay_near
go = threading.Event()
seen = []
thread = threading.Thread(target=lambda: (go.wait(), seen.append(os.sched_getaffinity(0))))
thread.start()
near = stay_near(sys.argv[1], Path(sys.argv[2]))
go.set(); thread.join()
print(sorted(near), sorted(os.sched_getaffinity(0)), sorted(seen[0]))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_process_with_all_its_threads_stays_near_and_may_be_left_alone(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    sysfs = machine(tmp_path, 0, f"{mine[0]},4000")

    def run(**variables: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, GPU, str(sysfs)], env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip

    assert run() == f"{[mine[0]]} {[mine[0]]} {[mine[0]]}"
    assert run(OPD_MEGATRON_NUMA="0") == f"[] {mine} {mine}"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_cores_that_this_process_may_not_use_are_not_taken(tmp_path: Path) -> None:
    sysfs = machine(tmp_path, 0, "4000-4003")
    code = SCRIPT.replace("print(", "assert not near; print(")
    subprocess.run(
        [sys.executable, "-c", code, GPU, str(sysfs)], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
