"""Entry point of a run: load the configuration, check it, build, train, close.

    python -m opd_megatron.train CONFIG [key.path=value ...]
    torchrun --nproc-per-node N -m opd_megatron.train CONFIG [key.path=value ...]

`opd-megatron train` is the same. A run directory that already holds a checkpoint of this run is continued.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_megatron.command import launcher
from opd_megatron.command.cli_args import parse_run, run_parser
from opd_megatron.config import RunConfig, decide_precision, dump_config
from opd_megatron.system import signals

if TYPE_CHECKING:
    from opd_megatron.models import ResolvedModels


def run_training(config: RunConfig, models: ResolvedModels) -> None:
    """Trains on the ranks that exist. Every rank of the run calls it, also those that hold engines or a teacher
    alone."""
    from opd_megatron.run.build import serve, serves_others
    from opd_megatron.trainer import OPDTrainer

    if serves_others(config):
        serve(config, models)
        return
    with OPDTrainer.from_config(config, models) as trainer:
        trainer.train()


def check(config: RunConfig) -> ResolvedModels:
    """Checks every rule that needs no process group and no weights; WORLD_SIZE's under torchrun too."""
    from opd_megatron.run.checks import check_run

    return check_run(config)


def settle_precision(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Decides `dtype: auto` as the run directory has it or this machine wants it, and says why in lines for a user."""
    from opd_megatron.run.run_dir import RunDir

    return decide_precision(config, RunDir(Path(config.output_dir)).settings())


def describe(config: RunConfig, models: ResolvedModels) -> str:
    """Writes what `--dry-run` prints: the resolved configuration, the process layout and the memory per rank."""
    from opd_megatron.planning import run_plan

    return f"{dump_config(config)}\n{run_plan.describe(config, models)}"


COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "train": ("Distil teachers into a student on the student's own samples.", {}),
    "distill": (
        "Distil teachers into a student on the student's own samples: `train` under the name of the field's scripts.",
        {},
    ),
    "hybrid": (
        "Reinforcement learning and distillation in one loss: `train` with rewards beside the teachers' divergence "
        "(lambda_rl 0.5, 4 answers a prompt, unless they are given).",
        {"objective.lambda_rl": 0.5, "rollout.samples_per_prompt": 4},
    ),
}  # fmt: skip
"""Name -> what it says of itself, and keys that it fills in."""


def train(argv: Sequence[str], prog: str = "opd-megatron train", command: str = "train") -> int:
    """Runs the `train` command, or another of `COMMANDS`; returns an exit code, raises OPDError for what a user can
    correct."""
    description, defaults = COMMANDS[command]
    arguments = parse_run(run_parser(prog, description), argv, defaults)
    config, lines = settle_precision(arguments.config)
    models = check(config)
    if arguments.dry_run:
        print(describe(config, models), *lines, sep="\n")
        return 0
    if launcher.needs_launch(config):
        if command == "train":
            return launcher.launch("opd_megatron.train", argv, config.world_size)
        return launcher.launch("opd_megatron.cli", [command, *argv], config.world_size)
    launcher.tell(lines)
    signals.note_stop_signals()
    run_training(config, models)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    return launcher.run_command(lambda: train(words, "python -m opd_megatron.train"))


if __name__ == "__main__":
    sys.exit(main())
