"""`make env` with Transformer Engine: everything else first, then its own build against the torch that is there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _make(folder: Path, extras: str, *, nvcc: bool) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs the script with an environment that writes down what it is asked."""
    (folder / "tools").mkdir()
    for name in ("setup.py", "constraints.txt", "overrides.txt", "overrides-cpu.txt", "tools/make_env.sh"):
        shutil.copy(ROOT / name, folder / name)
    log, binaries = folder / "asked", folder / "bin"
    (folder / ".venv/bin").mkdir(parents=True)
    binaries.mkdir()
    python = folder / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    python.chmod(0o755)
    if nvcc:
        (binaries / "nvcc").write_text("#!/bin/sh\n")
        (binaries / "nvcc").chmod(0o755)
    environment = os.environ | {
        "EXTRAS": extras,
        "PATH": f"{binaries}:/usr/bin:/bin",
        "CUDA_HOME": str(folder / "none"),
    }
    done = subprocess.run(
        [str(folder / "tools/make_env.sh")], env=environment, capture_output=True, text=True, check=False
    )
    return done, log.read_text().splitlines() if log.exists() else []


def test_transformer_engine_is_built_after_torch_is_there(tmp_path: Path) -> None:
    done, asked = _make(tmp_path, "vllm,te,dev", nvcc=True)
    assert done.returncode == 0, done.stderr
    installs = [line for line in asked if "pip install" in line]
    (first,) = [number for number, line in enumerate(installs) if "-e .[vllm,dev]" in line]
    (last,) = [number for number, line in enumerate(installs) if "transformer-engine" in line]
    assert first < last
    assert "--no-build-isolation" in installs[last]
    assert "==2.11.0" in installs[last]


@pytest.mark.parametrize(("extras", "nvcc", "said"), [
    ("vllm,te,dev", False, "nvcc"), ("cpu,te,dev", True, "leave te or cpu out"),
])  # fmt: skip
def test_a_machine_that_cannot_build_it_is_told_so_before_anything_is_installed(
    tmp_path: Path, extras: str, nvcc: bool, said: str
) -> None:
    done, asked = _make(tmp_path, extras, nvcc=nvcc)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not any("pip install" in line for line in asked)


def test_without_it_nothing_is_built(tmp_path: Path) -> None:
    done, asked = _make(tmp_path, "vllm,dev", nvcc=False)
    assert done.returncode == 0, done.stderr
    assert not any("transformer" in line for line in asked)
