"""Entry point of a run: load the configuration, check it, build, train, close.

    python -m opd_megatron.train CONFIG [key.path=value ...]
    torchrun --nproc-per-node N -m opd_megatron.train CONFIG [key.path=value ...]

`opd-megatron train` is the same. A run directory that already holds a checkpoint of this run is continued.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opd_megatron.command import launcher
from opd_megatron.command.cli_args import parse_run, run_parser
from opd_megatron.config import RunConfig, dump_config
from opd_megatron.system import signals


def run_training(config: RunConfig) -> None:
    """Trains on the ranks that exist. Every rank of the run calls it."""
    from opd_megatron.trainer import OPDTrainer

    with OPDTrainer.from_config(config) as trainer:
        trainer.train()


def check(config: RunConfig) -> None:
    """Every rule that can be checked before a process group or a model exists; WORLD_SIZE's under torchrun too."""
    config.require_available()
    from opd_megatron import models

    models.check(config)


def describe(config: RunConfig) -> str:
    """What `--dry-run` prints: the resolved configuration, the process layout and the memory per rank."""
    from opd_megatron.planning import run_plan

    return f"{dump_config(config)}\n{run_plan.describe(config)}"


def train(argv: Sequence[str], prog: str = "opd-megatron train") -> int:
    """The `train` command; returns an exit code, raises OPDError for what a user can mend."""
    description = "Distil teachers into a student on the student's own samples."
    arguments = parse_run(run_parser(prog, description), argv)
    check(arguments.config)
    if arguments.dry_run:
        print(describe(arguments.config))
        return 0
    if launcher.needs_launch(arguments.config):
        return launcher.launch("opd_megatron.train", argv, arguments.config.world_size)
    signals.note_stop_signals()
    run_training(arguments.config)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    return launcher.run_command(lambda: train(words, "python -m opd_megatron.train"))


if __name__ == "__main__":
    sys.exit(main())
