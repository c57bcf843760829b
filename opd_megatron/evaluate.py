"""`opd-megatron evaluate RUN_OR_HF --task NAME`: how many answers are right, of one model or of several side by side.

    evaluate runs/demo --task gsm8k --n 200 --samples 4 --compare initial --compare teacher
    evaluate Qwen/Qwen2.5-0.5B-Instruct --task gsm8k

The model lies in Megatron's layout of the run and answers through the rollout engine, as it does in training.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_megatron.command import launcher
from opd_megatron.command.cli_args import Parser, RunArguments, add_checkpoint, parse_run, run_parser
from opd_megatron.config import RunConfig, ServedTeacherConfig, build_config
from opd_megatron.config.run_folder import is_run
from opd_megatron.config.teachers import STUDENT
from opd_megatron.errors import ConfigError
from opd_megatron.tasks import task_named
from opd_megatron.train import check, describe, settle_precision

if TYPE_CHECKING:
    from opd_megatron.evaluation import Accuracy

COMPARED = ("initial", "teacher")
_LONGEST = 1024
"""Tokens of a prompt, and of an answer, of a model that is no run's; half of its context where that is less."""


@dataclass(frozen=True, slots=True)
class EvaluateArguments:
    """What the command line says besides the configuration."""

    task: str
    compare: list[str] = field(default_factory=list)
    checkpoint: str = "latest"
    json_path: Path | None = None


def evaluate_parser(description: str) -> Parser:
    """Builds the parser of `evaluate`."""
    parser = run_parser("opd-megatron evaluate", description)
    add_checkpoint(parser)
    parser.add_argument("--task", metavar="NAME", help="have held-out prompts answered and judged: gsm8k, math, ...")
    parser.add_argument("--n", type=int, metavar="N", help="prompts that are answered (default 200)")
    parser.add_argument("--samples", type=int, metavar="K", help="answers besides the greedy one, for avg@k and pass@k")
    parser.add_argument(
        "--k", type=int, action="append", default=[], metavar="K",
        help="report pass@K; may be given again (default: powers of two up to --samples)",
    )  # fmt: skip
    parser.add_argument("--data", metavar="PATH", help="where the prompts come from (data.eval_source)")
    parser.add_argument(
        "--compare", action="append", default=[], choices=COMPARED,
        help="evaluate this one too: the student before training, or its teachers; may be given again",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="where to write the result as JSON; a run keeps one anyway")
    return parser


def evaluate_task(argv: Sequence[str], parser: Parser, words: Any) -> int:
    """Runs the command with a task. `words`: what the parser has read of `argv`."""
    arguments = EvaluateArguments(
        words.task, list(dict.fromkeys(words.compare)), words.checkpoint, Path(words.json) if words.json else None
    )
    task_named(arguments.task)
    model = _model_named(words)
    if arguments.compare and model is not None:
        raise ConfigError(
            f"--compare {arguments.compare[0]} needs a run, which knows its teachers and what it began with: give its "
            "directory"
        )
    of_model = [] if model is None else _model_overrides(model, words)
    rest = [word for word in argv if word != model]
    parsed = parse_run(parser, [*of_model, *rest, *_overrides(words)])
    parsed.check_one_run()
    code = _evaluate(parsed, arguments, argv, of_run=model is None)
    _remove(parsed.config.output_dir)  # not after an error, which may name the engine's log in there
    return code


def _evaluate(parsed: RunArguments, arguments: EvaluateArguments, argv: Sequence[str], *, of_run: bool) -> int:
    config, lines = settle_precision(parsed.config.without_teacher_ranks())
    models = check(config)
    if parsed.dry_run:
        print(describe(config, models), *lines, sep="\n")
        return 0
    if launcher.needs_launch(config):
        return launcher.launch("opd_megatron.cli", ["evaluate", *argv], config.world_size)
    launcher.tell(lines)
    launcher.leave_cleanly_on_sigterm()
    results = _all(config, arguments, of_run=of_run)
    if results and launcher.is_first_rank():
        _report(results, config, arguments, of_run=of_run)
    return 0


def _all(config: RunConfig, arguments: EvaluateArguments, *, of_run: bool) -> list[Accuracy]:
    """Evaluates one model after the other; empty on a rank that only serves."""
    results = _student(config, arguments, of_run=of_run)
    if "teacher" in arguments.compare:
        for path in _teachers(config):
            teacher = _as_student(config, path)
            results += _student(teacher, EvaluateArguments(arguments.task), of_run=False)
            _remove(teacher.output_dir)
    return results


def _student(config: RunConfig, arguments: EvaluateArguments, *, of_run: bool) -> list[Accuracy]:
    from opd_megatron.run.build import serve, serves_others
    from opd_megatron.trainer import OPDTrainer

    models = check(config)
    how = {"sampling": False, "scoring": False, "answering": True}
    if serves_others(config, **how):
        serve(config, models, **how)
        return []
    results = []
    with OPDTrainer.from_config(config, models, **how) as trainer:
        first = "initial" in arguments.compare or not of_run
        if first:
            name, step = ("student at step 0", 0) if of_run else (config.student.path, None)
            results.append(trainer.answers(name, step))
        if of_run and not (first and arguments.checkpoint == "initial"):
            trainer.restore(arguments.checkpoint)
            results.insert(0, trainer.answers(f"student at step {trainer.step_count}", trainer.step_count))
    return results


def _teachers(config: RunConfig) -> list[str]:
    """Paths of the teachers that can be asked for answers."""
    paths = [
        teacher.path
        for number, teacher in enumerate(config.teachers)
        if number != config.reference and not teacher.is_student and not isinstance(teacher, ServedTeacherConfig)
    ]
    if not paths:
        raise ConfigError(
            "--compare teacher: the run has no teacher of its own weights that could answer (served ones, and the "
            "student itself, are left out): leave it out"
        )
    return list(dict.fromkeys(paths))


def _as_student(config: RunConfig, path: str) -> RunConfig:
    """The evaluation of another model with the same prompts, in the same layout."""
    tree = config.model_dump(mode="json")
    student = {"path": path, "dtype": tree["student"]["dtype"]}
    rollout = tree["rollout"] | {"placement": "student", "hosts": None}
    return build_config(
        {key: tree[key] for key in ("seed", "trust_remote_code", "data", "parallel", "evaluation", "logging")}
        | {"student": student, "rollout": rollout | _BARE_ROLLOUT, "teachers": _NO_TEACHERS, "output_dir": _scratch()}
        | {"rewards": {"time_limit": config.rewards.time_limit, "workers": config.rewards.workers}}
    )


_NO_TEACHERS = [{"path": STUDENT}]
"""None is loaded."""
_BARE_ROLLOUT = {"prompts_per_step": 64, "samples_per_prompt": 1, "steps_ahead": 0}
"""Nothing is trained, so that all that matters is that it goes with any layout."""
_SCRATCH = "opd-evaluate-"


def _scratch() -> str:
    """A folder for the engine's log of a model that is no run's."""
    return tempfile.mkdtemp(prefix=_SCRATCH)


def _model_named(words: Any) -> str | None:
    """The model that the command line names in the place of a run: a folder with a config.json, or a hub id."""
    names: list[str] = [word for word in words.arguments if "=" not in word]
    if words.config or not names or Path(names[0]).suffix in (".yaml", ".yml") or is_run(Path(names[0])):
        return None
    folder = Path(names[0])
    is_model = (folder / "config.json").is_file() if folder.is_dir() else not folder.exists() and _is_hub_id(names[0])
    return names[0] if is_model else None  # of anything else, the configuration says what is wrong


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _model_overrides(name: str, words: Any) -> list[str]:
    from opd_megatron.weights.hf_reader import load_hf_config, resolve_model

    context = getattr(load_hf_config(resolve_model(name)), "max_position_embeddings", None) or 2 * _LONGEST
    half, folder = min(_LONGEST, context // 2), _scratch()
    tree: dict[str, Any] = {f"rollout.{key}": value for key, value in _BARE_ROLLOUT.items()}
    tree |= {
        "student.path": name, "teachers": _NO_TEACHERS, "output_dir": folder, "data.source": _one_row(folder, words),
        "data.max_prompt_tokens": half, "rollout.max_new_tokens": half, "data.drop_long_prompts": True,
    }  # fmt: skip
    own = task_named(words.task).data
    if words.data is None and own is None:
        raise ConfigError(f"--task {words.task} has no data of its own: name some with --data")
    if words.data is None and own is not None:
        tree |= own.as_keys()
    return [f"{key}={json.dumps(value)}" for key, value in tree.items()]


def _one_row(folder: str, words: Any) -> str:
    """Training data of who trains on nothing: a row with the columns that the command line names."""
    named = [word.partition("=") for word in words.arguments]
    columns = [value for key, _, value in named if key.startswith("data.") and key.endswith("_column")]
    path = Path(folder).with_suffix(".jsonl")
    path.write_text(json.dumps(dict.fromkeys(["question", "answer", *columns], "1")) + "\n")
    return str(path)


def _overrides(words: Any) -> list[str]:
    for name, value, least in (("--n", words.n, 1), ("--samples", words.samples, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} {value} must be at least {least}: give a number of prompts, or of answers")
    tree: dict[str, Any] = {"evaluation.task": words.task, "evaluation.task_prompts": words.n or 200}
    tree |= {"evaluation.pass_at": [], "evaluation.every": 1, "evaluation.prompts": 1, "checkpoint.best_metric": None}
    if words.samples is not None:
        tree["evaluation.samples"] = words.samples
    if words.k:
        tree["evaluation.pass_at"] = words.k
    if words.data is not None:
        tree["data.eval_source"] = words.data
    return [f"{key}={json.dumps(value)}" for key, value in tree.items()]


def _report(results: Sequence[Accuracy], config: RunConfig, arguments: EvaluateArguments, *, of_run: bool) -> None:
    from rich.console import Console

    from opd_megatron.evaluation import comparison, to_json
    from opd_megatron.system.atomic import write_file

    Console().print(comparison(results))
    problems = sum(result.timeouts + result.errors for result in results)
    if problems:
        print(f"{problems} answers score 0 because their verifier was too slow or failed")
    paths = [arguments.json_path] if arguments.json_path else []
    if of_run:
        name = f"{arguments.task.replace(':', '-').replace('/', '-')}-step-{results[0].step}.json"
        paths.append(Path(config.output_dir) / "evaluation" / name)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, to_json(results))
        print(f"result    {path}")


def _remove(folder: str) -> None:
    if Path(folder).name.startswith(_SCRATCH):
        with contextlib.suppress(OSError):
            Path(folder).with_suffix(".jsonl").unlink(missing_ok=True)
            shutil.rmtree(folder)
