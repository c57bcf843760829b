"""`dtype: auto`: decided by the processor, kept by the run, written out, and told in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from opd_megatron.config import decide_precision, dump_config, load_config
from opd_megatron.system import processor as module
from opd_megatron.system.processor import Processor, processor

WITH, WITHOUT, GPU = Processor(False, "AMX-BF16"), Processor(False, None), Processor(True, "bf16")


def decide(
    machine: Processor, *overrides: str, kept: dict[str, object] | None = None
) -> tuple[tuple[str, ...], list[str]]:
    config, lines = decide_precision(load_config(None, list(overrides)), kept, machine)
    return (config.student.dtype, config.teachers[0].dtype, config.rollout.dtype), lines  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("machine", "dtype", "reason"),
    [(WITH, "bf16", "this CPU has AMX-BF16 units"), (GPU, "bf16", "this GPU has bf16 units"),
     (WITHOUT, "fp32", "this CPU has no AMX-BF16 or AVX512-BF16 units")],
)  # fmt: skip
def test_auto_is_what_the_processor_is_fast_in(machine: Processor, dtype: str, reason: str) -> None:
    assert decide(machine) == ((dtype,) * 3, [f"precision {dtype}: {reason}"])


def test_what_is_named_stays_and_is_warned_of_where_it_is_slow() -> None:
    assert decide(WITH, "student.dtype=fp32")[0] == ("fp32", "bf16", "fp32")
    dtypes, (line,) = decide(WITHOUT, "student.dtype=bf16", "rollout.dtype=fp32")
    assert dtypes == ("bf16", "fp32", "fp32")
    assert line.startswith("warning: student.dtype bf16, but this CPU has no AMX-BF16")
    assert "2 to 4 times" in line


def test_a_run_keeps_what_it_began_with_on_another_machine() -> None:
    kept = {"student": {"dtype": "bf16"}, "teachers": [{"dtype": "fp32"}]}
    dtypes, lines = decide(WITHOUT, kept=kept)
    assert dtypes == ("bf16", "fp32", "bf16")
    assert lines[0] == "precision bf16: as when the run began"
    assert decide(WITH, kept={"student": "?", "teachers": 3})[0] == ("bf16",) * 3


def test_what_is_written_holds_no_auto_and_an_old_null_is_read() -> None:
    config, _ = decide_precision(load_config(None, ["rollout.dtype=null"]), machine=WITHOUT)
    assert "dtype: auto" not in dump_config(config)


@pytest.mark.parametrize(
    ("amx", "avx512", "limit", "units"),
    [(True, True, None, "AMX-BF16"), (False, True, None, "AVX512-BF16"), (False, False, None, None),
     (True, True, "avx512_core_bf16", "AVX512-BF16"), (True, True, "AVX512_CORE_VNNI", None),
     (True, True, "AVX2", None), (True, True, "ALL", "AMX-BF16")],
)  # fmt: skip
def test_units_are_those_that_onednn_may_use(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, limit: str | None, units: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert module.processor.__wrapped__().bf16 == units


def test_doctor_tells_it() -> None:
    out = subprocess.run([sys.executable, "-m", "opd_megatron.cli", "doctor"], capture_output=True, text=True).stdout
    assert processor().reason in out
