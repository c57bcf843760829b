"""`python -m tests.stubs.with_te MODULE FUNCTION ARGUMENTS`: one rank in which Transformer Engine (the stand-in) is
installed and `student.transformer_engine=on` takes it; prints what the function returns, in JSON, on rank 0.

FUNCTION takes strings. Started by `run_with_te`, under torchrun.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
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
    assert done.returncode == 0, done.stderr[:6000]
    return next(json.loads(line.removeprefix(_MARK)) for line in done.stdout.splitlines() if line.startswith(_MARK))


def main() -> None:
    import transformer_engine

    assert Path(transformer_engine.__file__).is_relative_to(Path(__file__).parent)
    module, name, *arguments = sys.argv[1:]
    result = getattr(importlib.import_module(module), name)(*arguments)
    if os.environ["RANK"] == "0":
        print(_MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
