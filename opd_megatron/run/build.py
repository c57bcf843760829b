"""Making the parts of a run, in an order that finds mistakes early: sizes, data, process groups, models, engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.config import RunConfig
from opd_megatron.data.prompts import PromptStream, build_train_and_eval
from opd_megatron.data.tokenizer import check_same_tokenizer, load_tokenizer, stop_token_ids
from opd_megatron.errors import OPDError
from opd_megatron.mcore.checkpoint import (
    BestCheckpoint,
    CheckpointSaver,
    FoundCheckpoint,
    choose_checkpoint,
    raise_together,
)
from opd_megatron.mcore.cpu.platform import device, init_distributed
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import DTYPES
from opd_megatron.mcore.student import Student
from opd_megatron.metrics import NullDisplay, TrainingDisplay
from opd_megatron.models import ResolvedModels, check
from opd_megatron.rollout import RolloutEngine, build_engine
from opd_megatron.rollout.client import RolloutClient
from opd_megatron.run.evaluation import Evaluator
from opd_megatron.run.identity import identity_of
from opd_megatron.run.run_dir import RunDir
from opd_megatron.teacher import build_teachers
from opd_megatron.teacher.base import Teacher
from opd_megatron.types import Prompt
from opd_megatron.weight_sync.publisher import weight_stream
from opd_megatron.weights.save import save_hf

_ARCHITECTURE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
"""Keys of an HF config.json that tell one model from another; a folder's content may change under its name."""


@dataclass(slots=True)
class RunParts:
    """Everything a run is made of, on this rank."""

    config: RunConfig
    models: ResolvedModels
    run_dir: RunDir
    tokenizer: Any
    prompts: PromptStream
    student: Student
    teachers: list[Teacher]
    sampler: RolloutClient
    evaluator: Evaluator
    found: FoundCheckpoint | None
    """What the run goes on from."""
    saver: CheckpointSaver
    display: NullDisplay
    """The terminal on rank 0; shows nothing elsewhere."""
    device: torch.device
    length_multiple: int
    stop_token_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return self.models.vocab_size

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be one of this run: the settings that make it, and its model."""
        hf_config = self.models.student_config
        return identity_of(self.config.model_dump(mode="json")) | {
            f"model.{name}": getattr(hf_config, name, None) for name in _ARCHITECTURE
        }

    def export_hf(self) -> Path:
        """Writes the student as a Hugging Face folder. Collective over all ranks.

        Raises OPDError on every rank when rank 0 cannot write; an earlier export is left as it was.
        """
        buckets = self.student.export()
        failure: Exception | None = None
        if dist.get_rank() == 0:
            dtype = DTYPES[self.config.student.dtype]
            try:
                save_hf(
                    buckets,
                    self.student.hf_config,
                    self.run_dir.hf_dir,
                    tokenizer_dir=self.models.tokenizer,
                    dtype=dtype,
                )
            except (OPDError, OSError) as error:
                failure = error
        for _ in buckets:  # the export is collective: also when nobody reads it, or its reader failed
            pass
        raise_together(failure, f"the student was not exported to {str(self.run_dir.hf_dir)!r}")
        return self.run_dir.hf_dir

    def close(self) -> None:
        """Ends the engine, the display and the process group. Safe after a failure on some ranks only."""
        self.sampler.close()
        self.display.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def build_parts(config: RunConfig, *, sampling: bool = True, scoring: bool = True) -> RunParts:
    """Raises an OPDError child on every rank when something about the run is wrong.

    Without `sampling` the rollout engine is not launched, without `scoring` no teacher is loaded: for commands that
    do not need them.
    """
    run_dir = RunDir(Path(config.output_dir))
    models = check(config)
    run_dir.check(config)
    tokenizer = load_tokenizer(str(models.tokenizer), config.trust_remote_code)
    for teacher, (path, _) in zip(config.teachers, models.teachers, strict=True):
        other = load_tokenizer(str(path), config.trust_remote_code)
        check_same_tokenizer(tokenizer, other, str(models.tokenizer), teacher.path)
    prompts, held_out = build_train_and_eval(config, tokenizer)

    init_distributed()
    torch.manual_seed(config.seed)
    first = dist.get_rank() == 0
    found = choose_checkpoint(run_dir.checkpoints)
    unfinished = found is None or found.step < config.steps
    engine = _engine(config, models, run_dir, launch=sampling and unfinished) if first else None
    try:
        return _build_models(config, models, run_dir, tokenizer, prompts, held_out, engine, found, scoring)
    except BaseException:
        if engine is not None:
            engine.close()
        raise


def _build_models(
    config: RunConfig,
    models: ResolvedModels,
    run_dir: RunDir,
    tokenizer: Any,
    prompts: PromptStream,
    held_out: list[Prompt],
    engine: RolloutEngine | None,
    found: FoundCheckpoint | None,
    scoring: bool,
) -> RunParts:
    parallel = config.parallel
    grid = ParallelGrid.build(
        parallel.tensor,
        parallel.pipeline,
        models.data_parallel,
        ep_size=parallel.expert,
        sequence_parallel=parallel.sequence_parallel,
    )
    padded_vocab = models.padded_vocab(parallel.tensor)
    student = Student(config, models.student, models.student_config, grid, padded_vocab)
    teachers = build_teachers(config, models.teachers, grid, padded_vocab) if scoring else []
    length_multiple = parallel.tensor if parallel.sequence_parallel else 1
    first = dist.get_rank() == 0
    done = found.step if found else 0
    display = TrainingDisplay(config.steps, done, config.logging.progress) if first else NullDisplay()
    group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
    return RunParts(
        config=config,
        models=models,
        run_dir=run_dir,
        tokenizer=tokenizer,
        prompts=prompts,
        student=student,
        teachers=teachers,
        sampler=RolloutClient(
            engine,
            weight_stream(config, student, group, display.note),
            group,
            max_restarts=config.rollout.max_restarts,
            on_event=display.note,
        ),
        evaluator=Evaluator(
            config,
            held_out or [prompts.dataset[row] for row in range(min(len(prompts.dataset), 8))],
            teachers,
            grid,
            vocab_size=models.vocab_size,
            length_multiple=length_multiple,
            device=device(),
        ),
        found=found,
        saver=_saver(config, run_dir),
        display=display,
        device=device(),
        length_multiple=length_multiple,
        stop_token_ids=tuple(stop_token_ids(tokenizer, models.student)),
    )


def _saver(config: RunConfig, run_dir: RunDir) -> CheckpointSaver:
    settings = config.checkpoint
    best = BestCheckpoint(settings.best_metric, settings.best_mode) if settings.best_metric else None
    return CheckpointSaver(run_dir.checkpoints, keep=settings.keep, best=best, asynchronous=settings.async_save)


def _engine(config: RunConfig, models: ResolvedModels, run_dir: RunDir, *, launch: bool) -> RolloutEngine:
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    engine = build_engine(config, models.student, longest, run_dir.rollout_log)
    if launch:
        run_dir.prepare(config)  # its log goes there
        engine.launch()
    return engine
