"""`python -m tests.stubs.with_te MODULE FUNCTION ARGUMENTS`: one rank in which Transformer Engine (the stand-in) is
installed and `student.transformer_engine=on` takes it; prints what the function returns, in JSON, on rank 0.

FUNCTION takes strings. Started by `run_with_te`, under torchrun.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MARK = "result: "
_ROOT = Path(__file__).parents[2]


def run_with_te(ranks: int, function: str, *arguments: object, timeout: float = 240.0) -> Any:
    """Runs `module.function` with the arguments as strings on some ranks; returns rank 0's result."""
    module, _, name = function.rpartition(".")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
             "tests.stubs.with_te", module, name, *map(str, arguments)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{_ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    errors = [line for line in done.stderr.splitlines() if "Error: " in line or "/opd_megatron/" in line]
    assert done.returncode == 0, "\n".join([*errors[:20], done.stderr[:6000]])
    return next(json.loads(line.removeprefix(_MARK)) for line in done.stdout.splitlines() if line.startswith(_MARK))


def _send_buckets_apart() -> None:
    """Gloo gathers the buckets of one call as if all had the first one's dtype; those of FP8 weights and of others have
    two. NCCL takes each as it is."""
    from megatron.core.distributed import param_and_grad_buffer

    @contextlib.contextmanager
    def apart(*_: Any, **__: Any) -> Iterator[Any]:
        yield types.SimpleNamespace(wait=lambda: None)

    def at_once(collective: Any) -> Any:
        return lambda *args, async_op=False, **settings: collective(*args, **settings)

    param_and_grad_buffer._coalescing_manager = apart
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, at_once(getattr(param_and_grad_buffer, name)))


def main() -> None:
    import transformer_engine

    assert Path(transformer_engine.__file__).is_relative_to(Path(__file__).parent)
    _send_buckets_apart()
    module, name, *arguments = sys.argv[1:]
    result = getattr(importlib.import_module(module), name)(*arguments)
    if os.environ["RANK"] == "0":
        print(_MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
