"""Which arithmetic the processor of this process is fast in."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

FP32_IS_FASTER = "2 to 4 times"
"""A training step in bf16 against fp32 on a CPU without bf16 units (AVX2 and AVX512 machines, `make demo`)."""
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
_WITHOUT_AMX = {*_WITHOUT_BF16, "AVX512_CORE_BF16", "AVX512_CORE_FP16"}


@dataclass(frozen=True, slots=True)
class Processor:
    """What multiplies matrices here."""

    is_gpu: bool
    bf16: str | None
    """The units that multiply bf16; None where they are fp32's, with conversions around."""

    @property
    def reason(self) -> str:
        """Says in a few words why bf16 is, or is not, the better choice."""
        if self.bf16 is not None:
            return f"this {'GPU' if self.is_gpu else 'CPU'} has {self.bf16} units"
        kind, units = ("GPU", "bf16") if self.is_gpu else ("CPU", "AMX-BF16 or AVX512-BF16")
        return f"this {kind} has no {units} units"


BF16_GPU = Processor(True, "bf16")
"""Where a plan that is made on any machine will run."""


@functools.cache
def processor() -> Processor:
    """Examines this machine's GPU or, without one, its CPU as oneDNN may use it (ONEDNN_MAX_CPU_ISA)."""
    import torch

    if torch.cuda.is_available():
        return Processor(True, "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None)
    cpu, limit = torch.cpu, os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if cpu._is_amx_tile_supported() and limit not in _WITHOUT_AMX:  # processors with AMX all have its bf16 part
        return Processor(False, "AMX-BF16")
    if cpu._is_avx512_bf16_supported() and limit not in _WITHOUT_BF16:
        return Processor(False, "AVX512-BF16")
    return Processor(False, None)
