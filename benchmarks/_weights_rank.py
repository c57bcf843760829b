"""One rank of a conversion that benchmarks/weights.py measures; started by torchrun. Leaves rank_N.json in a folder.

python _weights_rank.py DIRECTION SOURCE OUT TENSOR PIPELINE REPORT_DIR
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import harness  # noqa: F401 - makes the package importable from a plain checkout


def peak_rss() -> int:
    """Bytes. VmHWM rather than ru_maxrss, which a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    direction, source, out, tensor, pipeline, report = sys.argv[1:]
    from opd_megatron.convert.hf_megatron import ParallelSizes, hf_to_megatron, megatron_to_hf
    from opd_megatron.mcore import model  # noqa: F401 - imported before the clock starts
    from opd_megatron.mcore.cpu.platform import init_distributed
    from opd_megatron.weights.hf_reader import load_hf_config

    load_hf_config(Path(source))  # imports transformers
    init_distributed()
    started = time.perf_counter()
    convert = {"hf_to_megatron": hf_to_megatron, "megatron_to_hf": megatron_to_hf}[direction]
    convert(source, out, ParallelSizes(int(tensor), int(pipeline)))
    figures = {"seconds": time.perf_counter() - started, "peak_rss": peak_rss()}
    Path(report, f"rank_{os.environ['RANK']}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
