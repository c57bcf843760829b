"""Training runs that a benchmark makes one after the other, and finds again when it is started anew."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import REPOSITORY, BenchmarkError


def made(folder: Path, settings: dict[str, Any], config: str | None = None) -> list[dict[str, Any]]:
    """Makes a run in `folder`, or finds it made; returns its rows of metrics.jsonl.

    Args:
        settings: key -> value; `steps` among them.
        config: YAML file that they change.

    Raises:
        BenchmarkError: it failed.
    """
    rows = _rows(folder)
    if rows and rows[-1]["step"] == settings["steps"] and (folder / "hf").is_dir():
        return rows
    words = [f"{key}={json.dumps(value)}" for key, value in ({"output_dir": str(folder)} | settings).items()]
    print(f"{time.strftime('%H:%M:%S')} {folder.name}", flush=True)
    command = [sys.executable, "-m", "opd_megatron.train", *([config] if config else []), *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"run {folder.name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return _rows(folder)


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
