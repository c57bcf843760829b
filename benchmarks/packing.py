"""Packed micro batches beside padded ones: a step of the demo's pair on answers of log-normal length (sigma 1).

Sixteen sequences with prompts of 48 tokens and answers of median 48, one of them of 400. Padded: micro batches of 8,
sorted by length, each as long as its longest sequence; with two pipeline stages all as long as the longest of the step.
Packed: rows of at most 1024 tokens. The two alternate in one process; times are of the teacher's pass and the update,
medians of three after one that warms up. Peaks are how far a step's resident memory rises, packed in full rows of 1024
tokens and padded in micro batches of 4, for the same tokens in answers of which one is as long as `longest`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _packing_rank
from _processes import assets
from harness import REPOSITORY, BenchmarkError, Check, Report, Row, main

LIMITS = {1: 0.65, 2: 0.5}
"""Packed step / padded step, by pipeline stages."""


def measured(student: Path, teacher: Path, pipeline: int, task: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(_packing_rank.__file__)
        words = [sys.executable, str(script), folder, str(student), str(teacher), str(pipeline), task]
        environment = {
            **os.environ, "PYTHONPATH": f"{REPOSITORY}:{script.parent}", "WORLD_SIZE": str(pipeline),
            "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // pipeline)),
        }  # fmt: skip
        ranks = [
            subprocess.Popen(
                words, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
            )
            for rank in range(pipeline)
        ]
        errors = [rank.communicate()[1] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise BenchmarkError(f"a rank failed:\n{next(text for text in errors if 'Error' in text)[-2000:]}")
        return json.loads((Path(folder) / "result.json").read_text())


def measure(arguments: argparse.Namespace) -> Report:
    teacher, student = assets(arguments.assets)
    report = Report()
    for pipeline in (1,) if arguments.quick else (1, 2):
        found = measured(student, teacher, pipeline, "time")
        ratio = found["packed"]["seconds"] / found["padded"]["seconds"]
        report.rows.append(_row(f"a step, {pipeline} stage{'s' if pipeline > 1 else ''}", found, ratio))
        report.checks.append(Check.at_most(f"packed / padded step, {pipeline} stages", ratio, LIMITS[pipeline]))
    if not arguments.quick:
        peaks = measured(student, teacher, 1, "memory")
        for each in peaks:
            report.rows.append(
                {
                    "what": f"peak of a step, longest answer {each['longest']}",
                    "padded": f"{each['padded'] / 1e9:.2f} GB",
                    "packed": f"{each['packed'] / 1e9:.2f} GB",
                    "packed / padded": each["packed"] / each["padded"],
                    "padding": "-",
                }
            )
        grows = {way: peaks[-1][way] / peaks[0][way] for way in ("packed", "padded")}
        report.checks.append(Check.at_most("growth of the packed peak with the longest answer", grows["packed"], 1.2))
        report.checks.append(Check.at_most("packed / padded growth", grows["packed"] / grows["padded"], 0.5))
    report.note = "Demo pair (24 and 30 layers) in bf16, two cores."
    return report


def _row(what: str, found: dict[str, Any], ratio: float) -> Row:
    padded, packed = found["padded"], found["packed"]
    return {
        "what": what,
        "padded": f"{padded['seconds']:.2f} s",
        "packed": f"{packed['seconds']:.2f} s",
        "packed / padded": ratio,
        "padding": f"{1 - padded['useful'] / padded['tokens']:.0%} of {padded['tokens']} tokens",
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--assets", default=str(REPOSITORY / "runs/assets"), help="folder with teacher/ and student/")


if __name__ == "__main__":
    main("packing", __doc__, measure, add_arguments)
