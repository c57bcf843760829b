"""The command line: `opd-megatron COMMAND`, with the commands of `_COMMANDS`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd_megatron import __version__
from opd_megatron.command import launcher
from opd_megatron.command.cli_args import Parser, add_checkpoint, config_reference, parse_run, run_parser
from opd_megatron.config import GOLD, load_config
from opd_megatron.errors import ConfigError
from opd_megatron.train import check, describe, settle_precision, train

if TYPE_CHECKING:
    from opd_megatron.trainer import OPDTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code: 0, 2 for an error that a user can correct, 130 for Ctrl-C."""
    words = sys.argv[1:] if argv is None else list(argv)
    return launcher.run_command(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"opd-megatron {__version__}")
        return 0
    command, *rest = words
    if command not in _COMMANDS:
        close = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands are {', '.join(_COMMANDS)}"
        raise ConfigError(f"unknown command {command!r}: {hint}")
    return _COMMANDS[command][0](rest)


def _evaluate(argv: list[str]) -> int:
    def evaluate(trainer: OPDTrainer) -> list[str]:
        return [f"{name:<20} {value:.4f}" for name, value in trainer.evaluate().items()]

    from opd_megatron.evaluate import evaluate_parser, evaluate_task

    description = (
        "Score a student against its teachers on held-out answers; with --task, say how many of its own answers are "
        "right. CONFIG may be a run directory or, with --task, a model."
    )
    parser = evaluate_parser(description)
    words, _ = parser.parse_known_intermixed_args(argv)  # a wrong word is `parse_run`'s to refuse
    if words.task is not None:
        return evaluate_task(argv, parser, words)
    for flag in ("n", "samples", "data", "compare", "json"):
        if getattr(words, flag) not in (None, []):
            raise ConfigError(f"--{flag} needs --task, which says who judges answers: gsm8k, math, ...")
    return _on_newest_weights("evaluate", parser, argv, evaluate, scoring=True)


def _export(argv: list[str]) -> int:
    def export(trainer: OPDTrainer) -> list[str]:
        from opd_megatron.run.export import export_hf

        return [f"student   {export_hf(trainer)}"]

    description = "Write the newest weights as a Hugging Face folder, output_dir/hf. CONFIG may be a run directory."
    parser = run_parser("opd-megatron export", description)
    add_checkpoint(parser)
    return _on_newest_weights("export", parser, argv, export, scoring=False)


def _on_newest_weights(
    command: str, parser: Parser, argv: list[str], action: Callable[[OPDTrainer], list[str]], *, scoring: bool
) -> int:
    """Restores a checkpoint of a run on all its ranks, calls `action` and prints the lines that it returns."""
    arguments = parse_run(parser, argv)
    arguments.check_one_run()
    asked = arguments.config.without_engine_hosts()
    config, lines = settle_precision(asked if scoring else asked.without_teacher_ranks())
    models = check(config)
    if arguments.dry_run:
        print(describe(config, models), *lines, sep="\n")
        return 0
    if launcher.needs_launch(config):
        return launcher.launch("opd_megatron.cli", [command, *argv], config.world_size)
    launcher.tell(lines)
    from opd_megatron.run.build import serve, serves_others
    from opd_megatron.trainer import OPDTrainer

    launcher.leave_cleanly_on_sigterm()
    if serves_others(config, sampling=False, scoring=scoring):
        serve(config, models, sampling=False, scoring=scoring)
        return 0
    with OPDTrainer.from_config(config, models, sampling=False, scoring=scoring) as trainer:
        trainer.restore(arguments.checkpoint)
        lines = action(trainer)
    if launcher.is_first_rank():
        print("\n".join(lines))
    return 0


def _cache_teacher(argv: list[str]) -> int:
    parser = run_parser(
        "opd-megatron cache-teacher",
        "Write the hidden states of a run's cached teachers (teachers.N.placement=cached) to disk, in a pass of their "
        "own. What is there already is kept.",
    )
    parser.add_argument(
        "--rollouts", action="append", default=[], metavar="PATH",
        help="answers that a run has saved (logging.rollouts=true): its run directory, or files; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--answers",
        action="store_true",
        help="gold answers of the training data; the default without --rollouts, where data.answers names no others",
    )
    parser.add_argument("--shard-mib", type=int, default=1024, metavar="N", help="size of a file (default 1024)")
    words, _ = parser.parse_known_intermixed_args(argv)
    arguments = parse_run(parser, argv)
    from opd_megatron.run.cache_command import as_pass, cache_teachers

    config, lines = settle_precision(arguments.config)
    config, cached = as_pass(config)
    models = check(config)
    if arguments.dry_run:
        print(describe(config, models), *lines, sep="\n")
        return 0
    if launcher.needs_launch(config):
        return launcher.launch("opd_megatron.cli", ["cache-teacher", *argv], config.world_size)
    launcher.tell(lines)
    launcher.leave_cleanly_on_sigterm()
    rollouts = [Path(path) for path in words.rollouts]
    gold = words.answers or (not rollouts and config.data.answers == GOLD)
    found = cache_teachers(
        config, models, cached, rollouts=rollouts, answers=gold,
        shard_bytes=max(1, words.shard_mib) * 2**20,
    )  # fmt: skip
    launcher.tell(found)
    return 0


def _data(argv: list[str]) -> int:
    parser = run_parser("opd-megatron data", "Show what student and teacher will see of a run's data, token by token.")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="prompts to show (default 3)")
    arguments, _ = parser.parse_known_intermixed_args(argv)  # a wrong word is `parse_run`'s to refuse
    config = parse_run(parser, argv).config
    from opd_megatron.metrics.console import tolerant
    from opd_megatron.run.data_command import show_data

    out = tolerant(sys.stdout)
    for line in show_data(config, max(0, arguments.show)):
        print(line, file=out)
    return 0


def _convert(argv: list[str]) -> int:
    from opd_megatron.convert.convert_command import dispatch

    return dispatch(argv)


def _report(argv: list[str]) -> int:
    parser = Parser(prog="opd-megatron report", description="Draw the curves of a run again and print its table.")
    parser.add_argument("run", metavar="RUN_DIR", help="output_dir of a run")
    run = Path(parser.parse_args(argv).run)
    from rich.console import Console

    from opd_megatron.run.report import write_report

    Console().print(write_report(run))
    return 0


def _doctor(argv: list[str]) -> int:
    parser = Parser(
        prog="opd-megatron doctor", description="What is installed, and can a run work here?",
        epilog="torchrun --nproc-per-node 8 -m opd_megatron.cli doctor --world CONFIG",
    )  # fmt: skip
    parser.add_argument(
        "--world", action="store_true",
        help="on every rank under torchrun or srun: compare the nodes' code, packages, addresses and clocks, and time "
        "all-reduce, all-to-all and broadcast over every kind of group",
    )  # fmt: skip
    parser.add_argument(
        "config", nargs="*", metavar="CONFIG | key.path=value", help="whose groups; data-parallel ones without it"
    )
    known = parser.parse_args(argv)
    if not known.world:
        if known.config:
            raise ConfigError(f"{known.config[0]!r} says nothing to doctor without --world: leave it out")
        from opd_megatron.doctor import run_doctor

        return run_doctor()
    from opd_megatron.world_check import run_world_check

    paths, overrides = [w for w in known.config if "=" not in w], [w for w in known.config if "=" in w]
    if len(paths) > 1:
        raise ConfigError(f"two config files, {paths[0]!r} and {paths[1]!r}: give one")
    return run_world_check(load_config(paths[0], overrides) if paths else None)


def _config(argv: list[str]) -> int:
    Parser(prog="opd-megatron config", description="List every configuration key.").parse_args(argv)
    print(config_reference())
    return 0


def _train(argv: list[str]) -> int:
    return train(argv)


def _distill(argv: list[str]) -> int:
    return train(argv, "opd-megatron distill", "distill")


def _hybrid(argv: list[str]) -> int:
    return train(argv, "opd-megatron hybrid", "hybrid")


def _plan(argv: list[str]) -> int:
    from opd_megatron.planning.plan_command import plan

    return plan(argv)


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "distil teachers into a student"),
    "distill": (_distill, "the same, under the name of the field's scripts"),
    "hybrid": (_hybrid, "the same with rewards beside the teachers' divergence"),
    "data": (_data, "show what student and teacher will see of the data, token by token"),
    "plan": (_plan, "check layout, memory, traffic and time of a run without its weights or machines"),
    "evaluate": (_evaluate, "score a student on held-out answers, or its own answers to a task"),
    "cache-teacher": (_cache_teacher, "write a teacher's hidden states to disk, for runs that need them again"),
    "export": (_export, "write a run's newest weights as a Hugging Face folder"),
    "convert": (_convert, "convert weights: Hugging Face <-> Megatron, GGUF -> Hugging Face"),
    "report": (_report, "draw the curves of a run again and print its table"),
    "doctor": (_doctor, "what is installed, and can a run work here"),
    "config": (_config, "every configuration key with type, default and meaning"),
}


def _overview() -> str:
    lines = ["usage: opd-megatron COMMAND ...\n", "On-policy distillation on Megatron-Core and vLLM.\n", "commands:"]
    lines += [f"  {name:<13} {what}" for name, (_, what) in _COMMANDS.items()]
    lines += ["\n`opd-megatron COMMAND --help` explains one. Start here: opd-megatron train configs/demo.yaml"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
