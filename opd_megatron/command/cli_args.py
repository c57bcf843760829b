"""The command line of a run: a YAML file, the field's usual flags as aliases, and key.path=value overrides.

    train CONFIG --student_model_path DIR --lambda_rl=0.1 optimizer.lr=5e-5

Precedence: file < aliases < key.path=value. An alias is only another spelling of a configuration key.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import BaseModel

from opd_megatron.config import RunConfig, load_config, sections_of
from opd_megatron.errors import ConfigError

ALIASES: dict[str, tuple[str, ...]] = {
    "student.path": ("student_model_path", "student_model"),
    "teachers.0.path": ("teacher_model_path", "teacher_model"),
    "data.source": ("dataset_path", "dataset"),
    "data.on_policy_fraction": ("lmbda", "on_policy_fraction"),
    "objective.type": ("distillation_type",),
    "objective.beta": ("distillation_beta",),
    "objective.temperature": ("distillation_temperature", "temperature"),
    "objective.alpha": ("distillation_alpha", "skew_alpha"),
    "objective.lambda_coef": ("lambda_coef",),
    "objective.kl_coef": ("kl_coef",),
    "objective.lambda_rl": ("lambda_rl",),
    "objective.lambda_distill": ("lambda_distill",),
    "objective.sft_coef": ("sft_coef",),
    "recipe": ("recipe",),
    "rewards.task": ("reward_task", "reward_function"),
    "rewards.advantage": ("advantage_estimator", "adv_estimator"),
    "rollout.prompts_per_step": ("prompts_per_step", "batch_size", "train_batch_size"),
    "rollout.samples_per_prompt": ("samples_per_prompt", "num_generations", "num_samples_per_prompt", "group_size"),
    "rollout.max_new_tokens": ("max_new_tokens", "max_completion_length", "max_response_length"),
    "data.max_prompt_tokens": ("max_prompt_tokens", "max_prompt_length"),
    "steps": ("steps", "max_steps", "num_steps", "train_iters"),
    "optimizer.lr": ("learning_rate", "lr"),
    "parallel.tensor": ("tensor_model_parallel_size", "tensor_parallel_size"),
    "parallel.pipeline": ("pipeline_model_parallel_size", "pipeline_parallel_size"),
    "parallel.micro_batch_size": ("micro_batch_size",),
    "checkpoint.every": ("save_interval", "save_steps"),
    "evaluation.every": ("eval_interval", "eval_steps"),
    "seed": ("seed",),
    "output_dir": ("output_dir",),
}
"""Configuration key -> flags that set it, as the field's scripts call it. `--temperature` divides the logits in the
loss; how the student samples is `rollout.temperature`. There is no `--alpha`: elsewhere it weighs distillation against
labels."""

_PATHS = ("DIR", "FILE", "PATH", "RUN_DIR", "CONFIG")
"""Metavars of arguments that are paths."""

EXAMPLES = """examples:
  opd-megatron train configs/demo.yaml
  opd-megatron train configs/demo.yaml parallel.tensor=3 optimizer.lr=5e-5
  opd-megatron train configs/gkd_gsm8k.yaml --student_model_path ./student --distillation_beta=0.5
  opd-megatron distill --student_model_path ./student --teacher_model_path ./teacher --dataset_path openai/gsm8k
  opd-megatron hybrid configs/hybrid_ifeval.yaml --lambda_rl 0.5 --lambda_distill 1.0
  opd-megatron train configs/gkd_gsm8k.yaml --dry-run
  torchrun --nproc-per-node 4 -m opd_megatron.train configs/demo.yaml parallel.pipeline=4

A run that needs several ranks and was not started by torchrun starts torchrun on this machine itself.
`opd-megatron config` lists every key with its type, default and meaning."""


@dataclass(frozen=True, slots=True)
class RunArguments:
    """The parsed command line of `train` or `evaluate`."""

    config: RunConfig
    dry_run: bool = False
    checkpoint: str = "latest"
    """Which checkpoint `evaluate` and `export` take."""
    run: str | None = None
    """The run directory, where one is given instead of a YAML file."""

    def check_one_run(self) -> None:
        """Raises ConfigError where a run is named and `output_dir` is another's: for commands that look at one."""
        if self.run is not None and os.path.realpath(self.config.output_dir) != os.path.realpath(self.run):
            raise ConfigError(
                f"output_dir={self.config.output_dir!r} is another run than {self.run!r}, which is named: leave "
                "output_dir out"
            )


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are ConfigErrors, so that the command line reports them like any other."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Expands `~` in what is a path: the shell leaves it alone behind an equals sign."""
        if options.get("metavar") in _PATHS:
            options.setdefault("type", os.path.expanduser)
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see {self.prog} --help")


def run_parser(prog: str, description: str) -> Parser:
    """Builds the parser of a command that takes a run configuration."""
    parser = Parser(prog=prog, description=description, epilog=EXAMPLES)
    parser.add_argument("arguments", nargs="*", metavar="CONFIG | key.path=value", help="YAML file, then overrides")
    parser.add_argument("--config", metavar="CONFIG", help="the YAML file, where it is not given by position")
    parser.add_argument("--dry-run", action="store_true", help="print config, process layout and memory, then stop")
    table = [f"{', '.join(f'--{name}' for name in names):<45} {key}" for key, names in ALIASES.items()]
    note = "other spellings of configuration keys, as --flag VALUE or --flag=VALUE; dashes for underscores work too"
    group = parser.add_argument_group("aliases", "\n".join([note, "", *table]))
    for key, names in ALIASES.items():
        group.add_argument(*_spellings(names), dest=key, action="append", metavar="VALUE", help=argparse.SUPPRESS)
    return parser


def add_checkpoint(parser: Parser) -> None:
    """Adds which checkpoint of a run a command takes."""
    parser.add_argument(
        "--checkpoint", default="latest", metavar="NAME",
        help="`latest` (the default), `best`, the number of a step, or `initial` for the student's own weights",
    )  # fmt: skip


def parse_run(parser: Parser, argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> RunArguments:
    """Reads a command line into a validated configuration. `defaults`: keys where neither file nor command line has
    them.

    Raises:
        ConfigError: an unknown flag, a second config file, nothing to go by, or a value that breaks a rule.
        MissingPathError: the YAML file does not exist.
    """
    known, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        raise ConfigError(unknown_flag(unknown[0], parser))
    paths = [os.path.expanduser(word) for word in known.arguments if "=" not in word]
    if known.config is not None:
        paths.insert(0, known.config)
    if len(paths) > 1:
        raise ConfigError(f"two config files, {paths[0]!r} and {paths[1]!r}: give one, and overrides as key.path=value")
    overrides = [*_alias_overrides(known), *(word for word in known.arguments if "=" in word)]
    if not paths and not overrides:
        raise ConfigError(f"no config file: give a YAML file, e.g. {parser.prog} configs/demo.yaml")
    path = paths[0] if paths else None
    run = path if path is not None and os.path.isdir(path) else None
    config = load_config(path, overrides, defaults)
    return RunArguments(config, known.dry_run, getattr(known, "checkpoint", "latest"), run)


def unknown_flag(flag: str, parser: argparse.ArgumentParser) -> str:
    """Explains in one line that a flag does not exist, and names the closest flag or key."""
    name = flag.partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    key = name.lstrip("-")
    keys = [key for key, *_ in config_keys()]
    if key in keys:
        return f"unknown flag {name!r}: write {key}=value without dashes"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"unknown flag {name!r}: did you mean {close[0]!r}?"
    return f"unknown flag {name!r}: see {parser.prog} --help, or set a configuration key with key.path=value"


def config_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Lists every configuration key in the order of the schema: (key, type, default, meaning)."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        sections = sections_of(annotation)
        if sections:
            index = "" if sections[0] is annotation else ".0"
            found: dict[str, tuple[str, str, str, str]] = {}
            for section in sections:  # the members of a union share most of their keys
                for row in config_keys(section, f"{prefix}{name}{index}."):
                    found.setdefault(row[0], row)
            yield from found.values()
            continue
        default = "required" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
        yield prefix + name, _type_name(annotation), default, " ".join((field.description or "").split())


def config_reference() -> str:
    """Writes the text of `opd-megatron config`: one key a line, its meaning below."""
    lines = [f"{key}  ({kind}, default {default})\n    {meaning}" for key, kind, default, meaning in config_keys()]
    return "\n".join(lines)


def _alias_overrides(known: argparse.Namespace) -> list[str]:
    overrides = []
    for key, names in ALIASES.items():
        values = list(dict.fromkeys(getattr(known, key) or []))
        if len(values) > 1:
            raise ConfigError(f"--{names[0]} (key {key}) is given as {values[0]!r} and as {values[1]!r}: keep one")
        # JSON is YAML, so a quoted value stays the text it is; pydantic turns it into a number where one is due.
        overrides += [f"{key}={json.dumps(value)}" for value in values]
    return overrides


def _spellings(names: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(flag for name in names for flag in (f"--{name}", f"--{name.replace('_', '-')}")))


def _parts(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", ())


def _type_name(annotation: Any) -> str:
    parts = _parts(annotation)
    if not parts:
        return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
    if hasattr(annotation, "__metadata__"):  # Annotated: the rule is shown by the error, the type here
        return _type_name(parts[0])
    return " | ".join(json.dumps(part) if isinstance(part, str) else _type_name(part) for part in parts)
