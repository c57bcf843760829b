"""`opd-megatron plan CONFIG [key.path=value ...] [--gpu NAME [--suggest]] [--mean-answer N] [--json PATH]`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from opd_megatron.command.cli_args import parse_run, run_parser
from opd_megatron.errors import ConfigError
from opd_megatron.planning.gpus import GPUS, gpu_named
from opd_megatron.planning.run_plan import format_plan, make_plan, to_dict

_DESCRIPTION = """Check a run without its weights or its machines: builds every distinct rank's shard of student and
teachers from their config.json alone, checks that each tensor of the checkpoint is held exactly once, and prints
memory, traffic and, for a GPU, the time of a step. Exit code 2 when a rank does not fit the GPU."""


def plan(argv: Sequence[str]) -> int:
    """Runs the command. Raises OPDError for what a user can correct, and when the run does not fit the named GPU."""
    parser = run_parser("opd-megatron plan", _DESCRIPTION)
    parser.add_argument("--gpu", metavar="NAME", help=f"judge and time it on this GPU: {', '.join(GPUS)}")
    parser.add_argument(
        "--suggest", action="store_true", help="look for the fastest layouts of as many ranks that fit; needs --gpu"
    )
    parser.add_argument(
        "--mean-answer", metavar="N", type=float,
        help="tokens of a mean answer; half of rollout.max_new_tokens by default",
    )  # fmt: skip
    parser.add_argument("--json", metavar="PATH", help="write the plan as JSON too")
    parser.add_argument(
        "--model-configs", metavar="DIR", action="append", default=[],
        help="DIR/<hub id>/config.json for models that are not here; may be repeated",
    )  # fmt: skip
    arguments, _ = parser.parse_known_intermixed_args(list(argv))  # a wrong word is `parse_run`'s to refuse
    gpu = gpu_named(arguments.gpu) if arguments.gpu else None
    if arguments.suggest and gpu is None:
        raise ConfigError(f"--suggest needs --gpu NAME to judge layouts by: one of {', '.join(GPUS)}")
    found = make_plan(
        parse_run(parser, argv).config, gpu, [Path(folder) for folder in arguments.model_configs],
        mean_answer=arguments.mean_answer, suggest=arguments.suggest,
    )  # fmt: skip
    print(format_plan(found))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(to_dict(found), indent=2) + "\n")
    found.require_fit()
    return 0
