"""The same losses however the model is laid over ranks: (TP, PP, DP) against one rank, in fp32, from the command line.

A tiny random Llama pair (even-headed; a vocabulary that TP 2 has to pad) trains for five steps in each layout, with
four micro-batches a step. Sequence i of a step samples from a seed of its own, whatever the layout, so all layouts see
the same samples as long as no sampled token flips. Layouts differ by rounding (about 1e-7 in a log-probability), and a
flip needs the random number to fall into a gap of that width: about one chance in a thousand over the whole run, and
always the same outcome for the same seed. A flip would show as a difference far above the limit and in `tokens`; it is
then a failed check, to be looked into, and --seed tells it from a real one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import _processes as processes
from harness import Check, Report, Row, main

from tests.byte_tokenizer import save_byte_tokenizer
from tests.tiny_models import save_tiny

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)]
STEPS, LIMIT = 5, 1e-4
VOCAB_SIZE = 275  # odd: TP 2 pads it


def make_inputs(folder: Path, seed: int) -> None:
    """teacher/, student/ and prompts.jsonl."""
    for offset, name in enumerate(("teacher", "student")):
        save_tiny(folder / name, seed=seed + offset, vocab_size=VOCAB_SIZE)
        save_byte_tokenizer(folder / name)
    draw = random.Random(seed)
    pairs = [(draw.randrange(1000), draw.randrange(1000)) for _ in range(64)]
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in pairs]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def overrides(folder: Path, layout: tuple[int, int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that differs from the defaults."""
    return processes.ONLY_STEPS | {
        "steps": STEPS, "seed": arguments.seed,
        "student.path": str(folder / "student"), "student.dtype": "fp32",
        "teachers.0.path": str(folder / "teacher"), "teachers.0.dtype": "fp32",
        "data.source": str(folder / "prompts.jsonl"), "data.max_prompt_tokens": 96,
        "rollout.engine": arguments.engine, "rollout.prompts_per_step": 8, "rollout.max_new_tokens": 16,
        "optimizer.lr": 1e-3,
        "parallel.tensor": layout[0], "parallel.pipeline": layout[1], "parallel.data": layout[2],
        "parallel.micro_batch_size": 2 // layout[2],
    }  # fmt: skip


def largest_difference(rows: list[Row], reference: list[Row], key: str) -> float:
    """max over steps of |value - reference| / |reference|."""
    assert len(rows) == len(reference) == STEPS
    return max(abs(row[key] - ref[key]) / abs(ref[key]) for row, ref in zip(rows, reference, strict=True))


def measure(arguments: argparse.Namespace) -> Report:
    layouts = LAYOUTS[:2] if arguments.quick else LAYOUTS
    report = Report(
        note=f"Tiny Llama pair, fp32, {STEPS} steps, {arguments.engine} rollouts; differences relative to one rank."
    )
    reference: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, arguments.seed)
        config = folder / "empty.yaml"
        config.write_text("")
        for layout in layouts:
            run_dir = folder / "-".join(map(str, layout))
            rows = processes.train(config, run_dir, overrides(folder, layout, arguments), OMP_NUM_THREADS="1").rows
            reference = reference or rows
            loss = largest_difference(rows, reference, "loss")
            report.rows.append(
                {
                    "(TP, PP, DP)": str(layout),
                    "first loss": rows[0]["loss"],
                    "last loss": rows[-1]["loss"],
                    "loss difference": loss,
                    "gradient norm difference": largest_difference(rows, reference, "grad_norm"),
                    "tokens": sum(row["tokens"] for row in rows),
                }
            )
            if layout != LAYOUTS[0]:
                report.checks.append(Check.at_most(f"loss difference {layout}", loss, LIMIT))
    idle = sum(a["loss"] == b["loss"] for a, b in itertools.pairwise(reference))
    report.checks.append(Check.at_most("steps that changed nothing, which would make the comparison empty", idle, 0))
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("torch", "vllm"), default="torch", help="rollout engine")
    parser.add_argument("--seed", type=int, default=0)


if __name__ == "__main__":
    main("parallel_parity", __doc__, measure, add_arguments)
