"""What the demo's run has learned: reverse KL on the student's own samples, held-out forward KL, held-out NLL.

Reads the run directory of `make demo` and, where there is none, makes that run. With --quick and no run to read, four
steps on the demo's models are made instead and only the reverse KL is checked, against a limit for four steps.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import _processes as processes
from harness import REPOSITORY, Check, Report, Row, main

from opd_megatron.metrics import Summary, read_metrics, summarize
from opd_megatron.metrics.summary import LABELS

REVERSE_KL_LIMIT, FORWARD_KL_LIMIT = 0.5, 2 / 3
QUICK_STEPS, QUICK_LIMIT = 4, 0.9


def table(summary: Summary) -> list[Row]:
    """One row a metric."""
    return [
        {"after": f"{summary.steps} steps", "metric": LABELS[key], "step 0": before, "last": after}
        | {"last / step 0": summary.ratio(key)}
        for key, (before, after) in summary.change.items()
    ]


def finished_run(run_dir: Path) -> bool:
    return (run_dir / "metrics.jsonl").is_file() and (run_dir / "hf").is_dir()


def quick_report(arguments: argparse.Namespace) -> Report:
    teacher, student = processes.assets(arguments.assets)
    overrides = processes.ONLY_STEPS | {
        "steps": QUICK_STEPS,
        "student.path": str(student),
        "teachers.0.path": str(teacher),
        "optimizer.warmup_steps": 0,
        "optimizer.decay": "constant",
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = processes.train(REPOSITORY / "configs/demo.yaml", Path(folder) / "run", overrides).rows
    ratio = rows[-1]["reverse_kl"] / rows[0]["reverse_kl"]
    check = Check.at_most(f"reverse KL on own samples, step {QUICK_STEPS} / step 1", ratio, QUICK_LIMIT)
    return Report(table(summarize(rows)), [check])


def measure(arguments: argparse.Namespace) -> Report:
    run_dir = Path(arguments.run_dir)
    if not finished_run(run_dir):
        if arguments.quick:
            return quick_report(arguments)
        processes.run_measured(["make", "demo"])
    rows = read_metrics(run_dir)
    summary = summarize(rows)
    note = (
        "SmolLM2-135M-Instruct teaches 24 of its 30 layers on-policy with vLLM rollouts: "
        f"{summary.step_seconds:.1f} s a step, {sum(row.get('time/step', 0) for row in rows) / 60:.1f} minutes in all."
    )
    checks = [
        Check.at_most("reverse KL on own samples, last / first", summary.ratio("reverse_kl"), REVERSE_KL_LIMIT),
        Check.at_most("held-out forward KL, last / first", summary.ratio("eval/forward_kl"), FORWARD_KL_LIMIT),
    ]
    return Report(table(summary), checks, note)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", default=str(REPOSITORY / "runs/demo"), help="run directory of the demo")
    parser.add_argument("--assets", default=str(REPOSITORY / "runs/assets"), help="folder with teacher/ and student/")


if __name__ == "__main__":
    main("demo", __doc__, measure, add_arguments)
