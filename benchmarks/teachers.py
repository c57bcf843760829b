"""A teacher on ranks of its own against one on the student's: bytes a token, memory, the time of a step.

bytes       what a teacher sends for each response token as hidden states, as full logits and as 128 entries of them
overlap     engines, teacher and student of set speeds (they sleep): a step with the teacher on its own rank costs
            the longer of teaching and training, plus the first micro batch's scores
memory      `--real`: how far the student's peak rises from 2 to 8 micro batches of the demo's models
step        `--real`: the demo's step with the teacher on the student's rank and on its own
curves      `--curves`: the demo in fp32 with its teacher on the student's rank and on a rank of its own; on the answers
            of the first run with the teacher there and from a cache; and with the teacher beside a perturbed copy of
            itself, as an ensemble
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _processes as processes
import torch
from harness import Check, Report, Row, main

from opd_megatron.planning.published import find_model
from opd_megatron.weights.hf_reader import load_hf_config

TOP_K, OVERLAP_LIMIT, GROWTH_LIMIT = 128, 1.15, 0.1
MODELS = ("Qwen/Qwen2.5-72B", "Qwen/Qwen3-30B-A3B")


def bytes_a_token() -> tuple[list[Row], list[Check]]:
    """By arithmetic, in bf16: tests/teacher count what is sent."""
    rows, checks = [], []
    for name in MODELS:
        hf_config = load_hf_config(find_model(name))
        states, logits = 2 * hf_config.hidden_size, 2 * hf_config.vocab_size
        entries = TOP_K * (4 + 4)
        for what, size in (("hidden states", states), ("logits", logits), (f"top {TOP_K} entries", entries)):
            rows.append(row(f"{name}: {what}, KiB a token", size / 1024, size / states, "of hidden states"))
        checks.append(Check.at_most(f"{name}: hidden states / logits", states / logits, 0.1))
    return rows, checks


def overlap(rank: int, world_size: int, score: float, train: float, count: int) -> float:
    """One step's seconds: rank 1 scores `count` micro batches, rank 0 trains on each as it comes."""
    import torch.distributed as dist

    from opd_megatron.teacher.wire import Expected, Inbox, Outbox

    group = dist.new_group(backend="gloo")
    dist.barrier(group)
    begin = time.perf_counter()
    if rank == 1:
        outbox = Outbox(group, 2)
        for index in range(count):
            time.sleep(score)
            outbox.send(torch.zeros(64, 576), 0, index)
        outbox.flush()
    else:
        expected = [Expected(index, 64, 1) for index in range(count)]
        inbox = Inbox(group, expected, 576, torch.float32, ahead=2, device=torch.device("cpu"), name="t")
        for index in range(count):
            assert len(inbox[index]) == 64
            time.sleep(train)
    return time.perf_counter() - begin


def measure_overlap(count: int) -> tuple[list[Row], list[Check]]:
    from tests.ranks import run_ranks

    rows, checks = [], []
    for score, train in ((0.05, 0.1), (0.1, 0.05)):
        took = run_ranks(2, overlap, score, train, count)[0]
        expected = max(score * count + train, score + train * count)
        name = f"{count} micro batches, scored in {score:g} s, trained on in {train:g} s each"
        rows.append(row(f"{name}, s", took, took / expected, "of the longer of the two"))
        checks.append(Check.at_most(f"{name}: measured / expected", took / expected, OVERLAP_LIMIT))
    return rows, checks


def measure_real(arguments: argparse.Namespace, teacher: Path, student: Path) -> tuple[list[Row], list[Check]]:
    """The demo's step and the peak of the student's rank, in both places."""
    rows, checks = [], []
    peaks: dict[tuple[str, int], float] = {}
    for placement in ("student", "own"):
        for prompts in (2, 8):
            settings: dict[str, Any] = processes.ONLY_STEPS | {
                "steps": arguments.steps, "student.path": str(student), "teachers.0.path": str(teacher),
                "teachers.0.placement": placement, "rollout.prompts_per_step": prompts,
                "parallel.micro_batch_size": 1,
                "data.limit": 8,  # rows that both sizes of step come to: the longest sequence is the same
            }  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                run = processes.train(arguments.config, Path(folder) / "run", settings)
            last = run.rows[1:-1] or run.rows[-1:]
            peaks[placement, prompts] = max(each["memory/peak"] for each in run.rows)
            phases = {
                name: statistics.median(each[f"time/{name}"] for each in last)
                for name in ("step", "rollout", "teacher", "train", "sync")
            }
            others = ", ".join(f"{name} {value:.1f}" for name, value in phases.items() if name != "step")
            others += f", peak of rank 0 {peaks[placement, prompts] / 2**30:.2f} GiB"
            rows.append(row(f"demo, placement={placement}, {prompts} micro batches, s", phases["step"], None, others))
    growth = peaks["own", 8] / peaks["own", 2] - 1
    checks.append(
        Check.at_most("own ranks: growth of the student's peak from 2 to 8 micro batches", growth, GROWTH_LIMIT)
    )
    return rows, checks


def measure_curves(arguments: argparse.Namespace, teacher: Path, student: Path) -> tuple[list[Row], list[Check]]:
    """What is learnt does not depend on where the teacher is."""
    rows, checks = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common: dict[str, Any] = processes.ONLY_STEPS | {
            "steps": arguments.steps, "student.path": str(student), "student.dtype": "fp32",
            "teachers.0.path": str(teacher), "teachers.0.dtype": "fp32",
        }  # fmt: skip
        cached = {"teachers.0.placement": "cached", "teachers.0.cache": str(folder / "states")}
        given = {"data.on_policy_fraction": 0, "data.answers": str(folder / "student")}
        places: dict[str, dict[str, Any]] = {
            "student": {"logging.rollouts": True}, "own": {"teachers.0.placement": "own"},
            "student, on the answers of the first run": given, "cached, on the same": given | cached,
        }  # fmt: skip
        curves: dict[str, list[float]] = {}
        for place, settings in places.items():
            if "teachers.0.cache" in settings:
                rows += cache_pass(arguments.config, folder, common | settings)
            run = processes.train(
                arguments.config, folder / place.replace(" ", "-").replace(",", ""), common | settings
            )
            curves[place] = [each["reverse_kl"] for each in run.rows]
            shown = " ".join(f"{value:.4f}" for value in curves[place])
            seconds = statistics.median(each["time/step"] for each in run.rows)
            rows.append(row(f"demo in fp32, placement={place}, s a step", seconds, None, f"reverse KL {shown}"))
        names = list(curves)
        for place, other, limit in ((names[1], names[0], 0.02), (names[3], names[2], 1e-4)):
            apart = max(abs(a - b) / b for a, b in zip(curves[place], curves[other], strict=True))
            checks.append(Check.at_most(f"placement={place}: largest difference of a step's reverse KL", apart, limit))
        found, also = measure_ensemble(arguments.config, folder, common, teacher)
    return rows + found, checks + also


def cache_pass(config: str, folder: Path, settings: dict[str, Any]) -> list[Row]:
    """Writes the teacher's states of the answers that the first run saved."""
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    command = [sys.executable, "-m", "opd_megatron.cli", "cache-teacher", config, f"output_dir={folder / 'none'}"]
    begin = time.perf_counter()
    processes.run_measured([*command, *words])
    seconds = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in (folder / "states").iterdir())
    return [row("demo in fp32, cache-teacher, s", seconds, None, f"{size / 1e6:.1f} MB of states")]


def measure_ensemble(
    config: str, folder: Path, common: dict[str, Any], teacher: Path
) -> tuple[list[Row], list[Check]]:  # fmt: skip
    """The teacher, a copy of it with noise on its weights, and both together."""
    perturb(teacher, folder / "perturbed")
    of_copy = {"teachers.1.path": str(folder / "perturbed"), "teachers.1.dtype": "fp32"}
    runs: dict[str, dict[str, Any]] = {
        "the teacher": {}, "its perturbed copy": {"teachers.0.path": str(folder / "perturbed")},
        "both, logit_mean": of_copy | {"objective.combine": "logit_mean"},
        "both, prob_mean, the copy on a rank of its own": of_copy
        | {"objective.combine": "prob_mean", "teachers.1.placement": "own"},
    }  # fmt: skip
    rows, nll = [], {}
    for name, settings in runs.items():
        values = common | settings | {"steps": 1, "optimizer.warmup_steps": 0, "evaluation.every": 1}
        run = processes.train(config, folder / name.replace(" ", "-").replace(",", ""), values)
        nll[name] = run.rows[0]["eval/teacher_nll"]
        kl = run.rows[0]["reverse_kl"]
        rows.append(
            row(f"demo in fp32, taught by {name}: held-out teacher NLL", nll[name], None, f"reverse KL {kl:.4f}")
        )
    alone = sorted([nll["the teacher"], nll["its perturbed copy"]])
    checks = [
        Check.at_most(f"{name}: NLL of the ensemble / of its worse member", nll[name] / alone[1], 1.0)
        for name in nll if name.startswith("both")
    ]  # fmt: skip
    return rows, checks


def perturb(source: Path, target: Path, share: float = 0.1) -> None:
    """Copies a model with noise of `share` of each matrix's own spread on it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(0)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                noise = torch.randn(tensor.shape, generator=generator) * share * tensor.float().std()
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})


def row(name: str, value: float, ratio: float | None, meaning: str) -> Row:
    return {"measured": name, "value": value, "ratio": ratio, "of what": meaning}


def measure(arguments: argparse.Namespace) -> Report:
    rows, checks = bytes_a_token()
    found, also = measure_overlap(6 if arguments.quick else 20)
    rows, checks = rows + found, checks + also
    if arguments.real:
        found, also = measure_real(arguments, *processes.assets(arguments.assets))
        rows, checks = rows + found, checks + also
    if arguments.curves:
        found, also = measure_curves(arguments, *processes.assets(arguments.assets))
        rows, checks = rows + found, checks + also
    note = (
        "Bytes by arithmetic, in bf16; the overlap over gloo between two processes that sleep; the demo's steps are "
        "real, with student, teacher and engine on the same two cores."
    )
    return Report(rows, checks, note)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    processes.add_demo(parser)
    parser.add_argument("--steps", type=int, default=4, help="steps of a real run, the first and last not counted")
    parser.add_argument(
        "--curves", action="store_true", help="also the demo in fp32 with its teacher elsewhere, 8 runs"
    )
    parser.add_argument("--real", action="store_true", help="also the demo's models, four runs")


if __name__ == "__main__":
    main("teachers", __doc__, measure, add_arguments)
