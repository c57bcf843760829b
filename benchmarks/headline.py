"""The headline: from one weak student, how far and how fast do sparse rewards and dense supervision bring it?

Everything is made here, from scratch. A teacher of 0.9 million parameters learns chains of three sums from answers
(`objective.type=sft`) of which nearly all are worked, step by step; the others tell the result alone, behind a =, so
that it knows these too. A student of half its size learns from as many of the one kind as of the other and then, for a
short while, mostly to guess: it can work chains out, but seldom does, and is mostly wrong. From this start it is
trained by rewards alone (GRPO), by every kind of distillation, and by both, on the same prompts, with the same grid
of learning rates (chosen on the first seed) and three seeds; held-out chains are answered greedily every few steps.

Resumes where it was ended: a run that is there is not made again (`--out`). `--quick` runs all of it in little.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _runs import made
from harness import REPOSITORY, Report, Row, main

TARGET = 0.6
"""Accuracy whose first sight is reported."""
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
SEEDS = (0, 1, 2)
METHODS: dict[str, dict[str, Any]] = {
    "GRPO": {"objective.lambda_distill": 0.0, "objective.lambda_rl": 1.0},
    "reverse KL": {"objective.type": "reverse_kl"},
    "forward KL": {"objective.type": "forward_kl"},
    "gkd 0.5": {"objective.type": "gkd", "objective.beta": 0.5},
    "on_policy_distill": {"objective.type": "on_policy_distill"},
    "jsd": {"objective.type": "jsd"},
    "hybrid": {"objective.type": "reverse_kl", "objective.lambda_distill": 1.0, "objective.lambda_rl": 0.5},
}
DIRECT_SHARES = {"mostly_worked": 0.1, "half": 0.5, "guesses": 0.9}
"""Data set -> share of answers that tell a result alone: the teacher's lessons, the student's first, and its last, in
which that result is wrong."""
_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}<|im_start|>{% else %}<|im_end|>{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of it."""

    teacher_steps: int = 1000
    student_steps: int = 1000
    weak_steps: int = 60
    steps: int = 40
    every: int = 2
    """Steps between evaluations."""
    prompts: int = 200
    """Held-out chains."""
    methods: Sequence[str] = tuple(METHODS)
    learning_rates: Sequence[float] = LEARNING_RATES
    seeds: Sequence[int] = SEEDS
    engine: str = "vllm"


QUICK = Scale(6, 6, 4, 4, 2, 4, ("GRPO", "reverse KL"), (1e-3,), (0,), "torch")


@dataclass(slots=True)
class Curve:
    """What one run has measured."""

    method: str
    lr: float
    seed: int
    accuracy: list[tuple[int, int, float, float]] = field(default_factory=list)
    """(steps, response tokens that were sampled, seconds of those steps, held-out accuracy) at every evaluation."""
    reverse_kl: float | None = None
    """On own samples, mean of the last five steps."""
    forward_kl: float | None = None
    """Held-out, at the end."""

    @property
    def final(self) -> float:
        """Mean of the last three evaluations."""
        return statistics.fmean(accuracy for *_, accuracy in self.accuracy[-3:])

    def reached(self) -> tuple[int, int, float] | None:
        """Steps, tokens and seconds to the target; None where it was not seen."""
        return next((tuple(before) for *before, accuracy in self.accuracy if accuracy >= TARGET), None)  # type: ignore[misc]


def problems(count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """(question, worked answer, result) of chains of numbers below ten, no two alike: 8-5+6, 8-5=3;3+6=9, 9."""
    chosen, seen = random.Random(seed), set()
    while len(seen) < count:
        total = chosen.randint(1, 9)
        question, worked = str(total), []
        for _ in range(3):
            sign, number = chosen.choice("+-"), chosen.randint(1, 9)
            result = total + number if sign == "+" else total - number
            worked.append(f"{total}{sign}{number}={result}")
            question, total = f"{question}{sign}{number}", result
        if question not in seen:
            seen.add(question)
            yield question, ";".join(worked), str(total)


def make_data(folder: Path) -> None:
    """Writes worked.jsonl, test.jsonl of chains that are not in it, and the sets of `DIRECT_SHARES`."""
    rows, chosen = list(problems(20_000, 0)), random.Random(1)
    train, test = rows[:-500], rows[-500:]
    sets = {"worked": [(q, worked) for q, worked, _ in train], "test": [(q, worked) for q, worked, _ in test]}
    for name, share in DIRECT_SHARES.items():
        off = (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5) if name == "guesses" else (0,)
        sets[name] = [
            (q, f"={int(result) + chosen.choice(off)}" if chosen.random() < share else worked)
            for q, worked, result in train
        ]
    for name, lines in sets.items():
        text = "".join(json.dumps({"question": q, "answer": answer}) + "\n" for q, answer in lines)
        (folder / f"{name}.jsonl").write_text(text)


def make_models(folder: Path) -> None:
    """Writes the untrained teacher and student, with a byte tokenizer."""
    from tests.byte_tokenizer import save_byte_tokenizer
    from tests.tiny_models import save_tiny

    for name, layers, inner in (("teacher", 4, 384), ("student", 3, 192)):
        save_tiny(
            folder / name, seed=1, hidden_size=128, num_hidden_layers=layers, intermediate_size=inner,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, initializer_range=0.02,
        )  # fmt: skip
        tokenizer = save_byte_tokenizer(folder / name)
        tokenizer.chat_template = _TEMPLATE
        tokenizer.save_pretrained(folder / name)


def train(name: str, folder: Path, scale: Scale, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Makes a run, or finds it made; returns its rows."""
    common = {
        "student.dtype": "fp32", "data.eval_source": str(folder / "test.jsonl"),
        "data.max_prompt_tokens": 16, "rollout.max_new_tokens": 32, "rollout.engine": scale.engine,
        "rollout.kv_cache_gib": 0.25, "evaluation.task": "gsm8k", "evaluation.task_prompts": scale.prompts,
        "evaluation.agreement": False, "rewards.instruction": False, "checkpoint.every": 0,
        "logging.tensorboard": False, "logging.progress": False, "logging.sample_every": 0,
        "optimizer.decay": "constant",
    }  # fmt: skip
    return made(folder / name, common | settings)


def schooled(name: str, model: str, folder: Path, data: str, steps: int, lr: float, scale: Scale) -> dict[str, Any]:
    """Trains a model by the likelihood of answers, as run `name`; returns its last row."""
    rows = train(
        name, folder, scale,
        {
            "objective.type": "sft", "student.path": str(folder / model), "data.source": str(folder / f"{data}.jsonl"),
            "steps": steps, "rollout.prompts_per_step": 128, "parallel.micro_batch_size": 128, "optimizer.lr": lr,
            "optimizer.warmup_steps": min(50, steps - 1), "optimizer.decay": "cosine", "evaluation.every": steps,
        },
    )  # fmt: skip
    return rows[-1]


def run(method: str, lr: float, seed: int, folder: Path, scale: Scale) -> Curve:
    """Trains the weak student by one method."""
    rows = train(
        f"{method.replace(' ', '_')}-{lr:g}-{seed}", folder, scale,
        {
            **METHODS[method], "student.path": str(folder / "student-weak" / "hf"), "seed": seed, "steps": scale.steps,
            "teachers": [{"path": str(folder / "teacher-sft" / "hf"), "dtype": "fp32"}],
            "data.source": str(folder / "worked.jsonl"), "rollout.prompts_per_step": 16,
            "rollout.samples_per_prompt": 8, "parallel.micro_batch_size": 64, "rewards.task": "gsm8k",
            "optimizer.lr": lr, "optimizer.warmup_steps": min(4, scale.steps - 1), "evaluation.every": scale.every,
            "evaluation.prompts": 64,
        },
    )  # fmt: skip
    curve, tokens, seconds = Curve(method, lr, seed), 0, 0.0
    for row in rows:
        tokens += row.get("tokens", 0)
        seconds += row.get("time/step", 0.0)
        if "eval/accuracy" in row:
            curve.accuracy.append((row["step"], tokens, seconds, row["eval/accuracy"]))
    kls = [row["reverse_kl"] for row in rows if "reverse_kl" in row][-5:]
    curve.reverse_kl = statistics.fmean(kls) if kls else None
    curve.forward_kl = rows[-1].get("eval/forward_kl")
    return curve


def better(curve: Curve) -> tuple[float, float]:
    """What learning rates are chosen by: fewest steps to the target, then the accuracy at the end."""
    reached = curve.reached()
    return (-reached[0] if reached else -1e9, curve.final)


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the least and the largest."""
    found = [form.format(value) for value in (statistics.median(values), min(values), max(values))]
    return found[0] if len(values) == 1 else f"{found[0]} ({found[1]} to {found[2]})"


def summary(method: str, curves: Sequence[Curve], steps: int) -> Row:
    """A row of the table: the chosen learning rate's seeds."""
    reached = [curve.reached() for curve in curves]
    seen = [each for each in reached if each is not None]
    lacking = len(reached) - len(seen)
    tail = f", not within {steps} of {lacking} in {len(reached)}" if lacking else ""
    kls = [curve.reverse_kl for curve in curves if curve.reverse_kl is not None]
    held_out = [curve.forward_kl for curve in curves if curve.forward_kl is not None]
    return {
        "method": method,
        "learning rate": f"{curves[0].lr:g}",
        f"steps to {TARGET:.0%}": (spread([each[0] for each in seen], "{:.0f}") if seen else "none") + tail,
        "tokens to it": spread([each[1] / 1e3 for each in seen], "{:.1f}k") if seen else "none",
        "seconds to it": spread([each[2] for each in seen], "{:.0f}") if seen else "none",
        "final accuracy": spread([curve.final for curve in curves], "{:.3f}"),
        "reverse KL": spread(kls, "{:.3f}") if kls else "-",
        "held-out forward KL": spread(held_out, "{:.3f}") if held_out else "-",
    }


def draw(path: Path, chosen: dict[str, list[Curve]], start: float, teacher: float) -> None:
    """Draws accuracy over steps, and over sampled tokens: the median of the seeds, and all between the extremes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from opd_megatron.metrics.plots import STYLE

    colours = ("#c0392b", "#3b6fb6", "#4f9d69", "#8d6bb0", "#d1742b", "#7f7f7f", "#1f2d3d")
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2, sharey=True)
        for ax, what, label in zip(axes, (0, 1), ("optimizer steps", "sampled tokens, thousands"), strict=True):
            for colour, (method, curves) in zip(colours, chosen.items(), strict=False):
                points = range(len(curves[0].accuracy))
                x = [statistics.median(each.accuracy[i][what] for each in curves) for i in points]
                y = [sorted(each.accuracy[i][3] for each in curves) for i in points]
                x = [value / (1e3 if what else 1) for value in x]
                ax.plot(x, [statistics.median(each) for each in y], color=colour, label=method, linewidth=1.7)
                ax.fill_between(x, [each[0] for each in y], [each[-1] for each in y], color=colour, alpha=0.12)
            ax.axhline(teacher, color="#555555", linewidth=1, linestyle=":")
            ax.set(xlabel=label, ylim=(0, 1.02))
        axes[0].set(ylabel="held-out accuracy (greedy)", title=f"From {start:.0%}; dotted: the teacher")
        axes[0].legend(fontsize=8)
        figure.savefig(path, dpi=130)


def measure(arguments: argparse.Namespace) -> Report:
    """Runs all of it."""
    scale = QUICK if arguments.quick else Scale()
    folder = Path(arguments.out + ("-quick" if arguments.quick else "")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "test.jsonl").exists():
        make_models(folder)
        make_data(folder)
    teacher = schooled("teacher-sft", "teacher", folder, "mostly_worked", scale.teacher_steps, 3e-3, scale)
    able = schooled("student-sft", "student", folder, "half", scale.student_steps, 3e-3, scale)
    weak = schooled("student-weak", "student-sft/hf", folder, "guesses", scale.weak_steps, 2e-4, scale)
    report, chosen, everything = Report(), {}, []
    for method in scale.methods:
        grid = [run(method, lr, scale.seeds[0], folder, scale) for lr in scale.learning_rates]
        best = max(grid, key=better)
        curves = [best, *(run(method, best.lr, seed, folder, scale) for seed in scale.seeds[1:])]
        chosen[method], everything = curves, everything + grid + curves[1:]
        report.rows.append(summary(method, curves, scale.steps))
    start, strong = weak["eval/accuracy"], teacher["eval/accuracy"]
    report.note = (
        f"Teacher {strong:.3f}, student before it was led astray {able['eval/accuracy']:.3f}, at the start {start:.3f} "
        f"of {scale.prompts} held-out chains; 16 prompts x 8 answers a step, {scale.steps} steps, evaluated every "
        f"{scale.every}; learning rate of {len(scale.learning_rates)} chosen on the first seed; median of "
        f"{len(scale.seeds)} seeds (least to largest)."
    )
    if not arguments.quick:
        picture, data = Path(arguments.picture), Path(arguments.data)
        draw(picture, chosen, start, strong)
        data.write_text(json.dumps(_tree(everything, report, start, strong), indent=1) + "\n")
        print(f"written: {data} and {picture}")
    return report


def _tree(curves: Sequence[Curve], report: Report, start: float, teacher: float) -> dict[str, Any]:
    from opd_megatron.system.processor import processor

    return {
        "target": TARGET, "start": start, "teacher": teacher,
        "processor": processor().reason, "rows": report.rows, "note": report.note,
        "runs": [
            {
                "method": curve.method, "learning_rate": curve.lr, "seed": curve.seed, "reverse_kl": curve.reverse_kl,
                "held_out_forward_kl": curve.forward_kl,
                "steps_tokens_seconds_accuracy": [
                    [step, tokens, round(time_, 1), accuracy] for step, tokens, time_, accuracy in curve.accuracy
                ],
            }
            for curve in curves
        ],
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default=str(REPOSITORY / "runs/headline"), help="folder of the runs")
    parser.add_argument("--data", default=str(REPOSITORY / "docs/headline.json"), help="where the results go")
    parser.add_argument("--picture", default=str(REPOSITORY / "docs/headline.png"), help="where the picture goes")


if __name__ == "__main__":
    main("headline", __doc__, measure, add_arguments)
