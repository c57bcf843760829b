"""The demo's pair by every objective: 20 steps each on the same prompts, then its distance from the teacher and its
likelihood of gold answers on held-out rows.

One learning rate for all, the demo's: a comparison of what the objectives do with it, not of what each could reach.
Needs the demo's weights (`make demo`, or tools/demo_assets.py). Resumes where it was ended (`--out`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _runs import made
from harness import REPOSITORY, BenchmarkError, Report, main

from opd_megatron.config import recipes
from opd_megatron.losses.objectives import OBJECTIVES

RECIPES = ("exopd", "iw_opd", "mopd", "thinking_machines")
"""Those that are no `objective.type` of their own."""
QUICK = ("reverse_kl", "sft")


def measure(arguments: argparse.Namespace) -> Report:
    """Runs all of them."""
    if not (REPOSITORY / "runs/assets/student").is_dir():
        raise BenchmarkError("the demo's weights are not there: python tools/demo_assets.py --out runs/assets")
    names = QUICK if arguments.quick else (*OBJECTIVES, *RECIPES)
    steps = 2 if arguments.quick else 20
    report = Report(
        note=f"{steps} steps of configs/demo.yaml at learning rate 1e-4; held-out rows are always the same. exopd's "
        "divergences are from its extrapolated teacher."
    )
    for name in names:
        chosen = {"objective.type": name}
        if name in RECIPES:  # the demo names a type, so that the recipe's own has to be said
            chosen = {"recipe": name, "objective.type": recipes.RECIPES[name].fixed["objective.type"]}
        settings: dict[str, Any] = {
            **chosen, "steps": steps, "evaluation.every": steps, "checkpoint.every": 0, "logging.tensorboard": False,
            "logging.sample_every": 0, "logging.progress": False, "evaluation.agreement": False,
            "optimizer.warmup_steps": min(2, steps - 1),
        }  # fmt: skip
        rows = made(Path(arguments.out).resolve() / f"{name}-{steps}", settings, "configs/demo.yaml")
        first, last = rows[0], rows[-1]
        report.rows.append({
            "objective": name,
            "held-out NLL": last["eval/nll"], "change of it": last["eval/nll"] - first["eval/nll"],
            "forward KL": last.get("eval/forward_kl"), "reverse KL": last.get("eval/reverse_kl"),
            "reverse KL on own samples": last.get("reverse_kl"),
        })  # fmt: skip
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default=str(REPOSITORY / "runs/objectives"), help="folder of the runs")


if __name__ == "__main__":
    main("objectives", __doc__, measure, add_arguments)
