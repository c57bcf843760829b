"""Memory of one optimizer step on a single answer of so many tokens, beside TRL's DistillationTrainer on the same pair.

The demo's student and teacher with their context lengthened, bf16, reverse KL, one sequence of 64 prompt tokens; the
answers are given, so that nothing is sampled. Each figure is the largest resident memory of a process of its own, with
libraries, over two steps: weights, gradients and Adam's state are all there. Layers are recomputed on both sides
(`student.recompute=true`, `gradient_checkpointing=True`); TRL has its chunked form of the loss, with bf16 weights and
moments, its smallest; ours keeps fp32 main weights and moments.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _long_answers_rank
import psutil
from _processes import assets
from harness import REPOSITORY, BenchmarkError, Check, Report, main

LENGTHS = (2048, 4096, 8192, 16384)
MOST = 22 * 2**30
"""Bytes at which a process is ended: the machine has 24 GiB."""
LIMIT_AT_16K = 6.0
"""GiB."""


def longer(source: Path, folder: Path) -> Path:
    """The same model with a context of 64k tokens."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 65536}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measured(side: str, pair: tuple[Path, Path], length: int) -> dict[str, Any] | None:
    """Peak bytes and seconds of a step; None where it needs more memory than there is."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = [sys.executable, str(Path(_long_answers_rank.__file__)), side, *map(str, pair), str(length), str(out)]
        path = f"{REPOSITORY}:{Path(__file__).parent}"
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log)
            while process.poll() is None:
                time.sleep(0.2)
                try:
                    too_much = psutil.Process(process.pid).memory_info().rss > MOST
                except psutil.NoSuchProcess:
                    break
                if too_much:
                    process.kill()
                    process.wait()
                    return None
            if process.wait():
                log.seek(0)
                raise BenchmarkError(f"{side} at {length} tokens failed: {log.read()[-800:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def measure(arguments: argparse.Namespace) -> Report:
    teacher, student = assets(arguments.assets)
    report, folder = Report(), Path(tempfile.mkdtemp())
    try:
        pair = longer(student, folder / "student"), longer(teacher, folder / "teacher")
        lengths = tuple(map(int, arguments.lengths.split(","))) if arguments.lengths else LENGTHS
        for length in lengths[:1] if arguments.quick else lengths:
            row: dict[str, Any] = {"answer, tokens": length}
            for side in ("ours", "trl"):
                found = measured(side, pair, length)
                name = "opd_megatron" if side == "ours" else "TRL"
                row[f"{name}, GiB"] = "over 22" if found is None else f"{found['peak'] / 2**30:.2f}"
                row[f"{name}, s a step"] = "-" if found is None else f"{found['seconds']:.0f}"
                if side == "ours" and length == 16384 and found is not None:
                    check = Check.at_most("GiB at 16k tokens", found["peak"] / 2**30, LIMIT_AT_16K)
                    report.checks.append(check)
            report.rows.append(row)
            print(row, file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    report.note = "Demo pair (24 and 30 layers), bf16, recomputed layers, one sequence a step."
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--assets", default=str(REPOSITORY / "runs/assets"), help="folder with teacher/ and student/")
    parser.add_argument("--lengths", help="tokens of an answer, such as 8192,32768")


if __name__ == "__main__":
    main("long_answers", __doc__, measure, add_arguments)
