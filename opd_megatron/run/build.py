"""Builds the parts of a run, in an order that finds mistakes early: sizes, data, process groups, models, engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from opd_megatron.config import RunConfig, decide_precision, take_precision
from opd_megatron.data.batching import MicroBatchBuilder
from opd_megatron.data.given_answers import GivenAnswers
from opd_megatron.data.prompts import PromptStream
from opd_megatron.data.stages import RolloutStage
from opd_megatron.errors import ConfigError
from opd_megatron.evaluation import AccuracyEvaluator
from opd_megatron.mcore.checkpoint import BestCheckpoint, CheckpointSaver, FoundCheckpoint, choose_checkpoint
from opd_megatron.mcore.cpu.platform import (
    device,
    free_caches,
    has_gpu,
    init_distributed,
    let_transfers_overtake,
    narrow_world,
)
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.student import Student
from opd_megatron.mcore.te import check_machine
from opd_megatron.mcore.te import notes as te_notes
from opd_megatron.metrics import NullDisplay, TrainingDisplay
from opd_megatron.models import ResolvedModels
from opd_megatron.models.sizes import LayerSizes
from opd_megatron.places import Places, cut_places, ranks_per_node
from opd_megatron.rewards import Rewards
from opd_megatron.rollout import weight_format
from opd_megatron.rollout.client import RolloutClient
from opd_megatron.rollout.turns import sleeps
from opd_megatron.run.checks import check_run
from opd_megatron.run.engines import Fleet
from opd_megatron.run.evaluation import Evaluator
from opd_megatron.run.identity import run_identity, settings_identity, teacher_fingerprints, with_fingerprints
from opd_megatron.run.inputs import RunInputs, inputs_once_a_node
from opd_megatron.run.lock import RunLock
from opd_megatron.run.run_dir import RunDir
from opd_megatron.run.siblings import Siblings
from opd_megatron.run.teacher_lines import teacher_lines
from opd_megatron.system.collectives import on_all_ranks
from opd_megatron.system.groups import cpu_group
from opd_megatron.system.ranks import launched
from opd_megatron.system.shared_folder import check_shared
from opd_megatron.system.world import check_versions
from opd_megatron.teacher import Teacher, TeacherLink, Views, build_host, build_teachers, join_teachers
from opd_megatron.types import Prompt
from opd_megatron.weight_sync.publisher import WeightPublisher

_EVALUATED_WITHOUT_DATA = 8
"""Training prompts that stand in for held-out ones where there are none."""


@dataclass(kw_only=True)
class RunParts:
    """The parts of a run on this rank. `OPDTrainer` is one, so that these are its own attributes."""

    config: RunConfig
    models: ResolvedModels
    """Where the models lie and what their configs say."""
    run_dir: RunDir
    tokenizer: Any
    """The student's."""
    prompts: PromptStream
    """Endless; knows where it is, so that a run resumes at the right prompt."""
    rollout_client: RolloutClient
    """Samples from the student's current weights; looks the same on every rank."""
    given: GivenAnswers | None = None
    """Answers that are not sampled; None where all are."""
    rewards: Rewards | None = None
    """Judges answers; None where nobody does."""
    siblings: Siblings | None = None
    """For teachers that read another answer; None where none does."""
    stages: tuple[RolloutStage, ...] = ()
    """What happens to rollouts between sampling and batching; nothing today."""
    batches: MicroBatchBuilder
    student: Student
    teachers: list[Teacher]
    views: Views
    """What each teacher sees of a step."""
    evaluator: Evaluator
    accuracy: AccuracyEvaluator | None = None
    """Has held-out prompts answered; None where no task is evaluated."""
    resume_from: FoundCheckpoint | None
    """The newest whole checkpoint of the run directory; None at the start of a run."""
    saver: CheckpointSaver
    display: NullDisplay
    """The terminal on rank 0; shows nothing elsewhere."""
    stop_token_ids: tuple[int, ...]
    """Tokens that end an answer."""
    identity: dict[str, Any]
    """What the run must stay when it is resumed (`run.identity`)."""
    trains: bool = True
    """False for a command that only looks at the student."""
    lock: RunLock | None = None
    """Held by rank 0 of a run that trains."""

    def close(self) -> None:
        """Ends the engine, the teachers, the display and the process group; gives the run directory back. Safe after a
        failure on some ranks only."""
        self.rollout_client.close()
        for teacher in self.teachers:
            teacher.close()
        for judges in (self.rewards, self.accuracy):
            if judges is not None:
                judges.close()
        self.display.close()
        if self.lock is not None:
            self.lock.release()
        if dist.is_initialized():
            dist.destroy_process_group()


Parts = TypeVar("Parts", bound=RunParts)


def build_run(
    kind: type[Parts],
    config: RunConfig,
    models: ResolvedModels | None = None,
    *,
    sampling: bool = True,
    scoring: bool = True,
    answering: bool = False,
) -> Parts:
    """Makes a `kind` of all parts. Raises an OPDError child on every rank when something about the run is wrong.

    Args:
        models: what `check_run` returned, where the caller has called it already.
        sampling: train; commands that only look at the student leave it out.
        scoring: load the teachers.
        answering: launch the rollout engine though nothing is trained.
    """
    config = _for_command(config, sampling=sampling or answering, scoring=scoring)
    run_dir, config, models, inputs, identity = _checked(config, models, sampling=sampling, scoring=scoring)
    torch.manual_seed(config.seed)
    lock = _own(run_dir, config, identity) if sampling else None
    fleet: Fleet | None = None
    try:
        resume_from = choose_checkpoint(run_dir.checkpoints)
        fleet, links = _places(config, models)
        finished = resume_from if sampling else None
        _launch(fleet, config, models, run_dir, inputs, finished, launch=sampling or answering)
        grid = _grid(config, models)
        student, teachers = _models(config, models, grid, links, inputs, scoring)
        views = Views.of_run(config, models, inputs.pairs)
        batches = _batches(config, models, grid, views)
        scored = scored_prompts(inputs)
        display = _display(config, resume_from, trains=sampling)
        if config.left_out and scoring:
            display.note(f"the objective asks no teacher: {', '.join(config.left_out)} is not loaded")
        notes = [*te_notes(config.student.transformer_engine), *inputs.notes]
        for note in [*teacher_lines(config, models), *notes] if scoring else notes:
            display.note(note)
        client = _rollout_client(config, fleet, student, teachers, display)
        accuracy = None
        if sampling or answering:
            stops = inputs.stop_token_ids
            accuracy = AccuracyEvaluator.of(config, inputs.held_out, inputs.tokenizer, client, stops)
        return kind(
            config=config,
            models=models,
            run_dir=run_dir,
            tokenizer=inputs.tokenizer,
            prompts=inputs.prompts,
            given=inputs.given,
            siblings=_siblings(inputs) if sampling else None,
            rewards=_rewards(config, inputs) if sampling else None,
            rollout_client=client,
            batches=batches,
            student=student,
            teachers=teachers,
            views=views,
            evaluator=Evaluator(config, scored, teachers, batches, views, models.vocab_size),
            accuracy=accuracy,
            resume_from=resume_from,
            saver=_saver(config, run_dir),
            display=display,
            stop_token_ids=inputs.stop_token_ids,
            identity=identity,
            trains=sampling,
            lock=lock,
        )
    except BaseException:
        if fleet is not None:
            fleet.close()
        if lock is not None:
            lock.release()
        raise


def serves_others(config: RunConfig, *, sampling: bool = True, scoring: bool = True, answering: bool = False) -> bool:
    """Whether this rank holds engines or a teacher alone, and no part of the student."""
    config, ranks = _for_command(config, sampling=sampling or answering, scoring=scoring), launched()
    others = config.teacher_ranks + (config.rollout.hosts or 0)
    return ranks is not None and ranks.rank >= ranks.world_size - others


def serve(
    config: RunConfig,
    models: ResolvedModels | None = None,
    *,
    sampling: bool = True,
    scoring: bool = True,
    answering: bool = False,
) -> None:
    """What a rank of engines' or of a teacher's own does of a run, until the student's ranks let it go. It is in the
    collectives of `build_run` that are of all ranks."""
    config = _for_command(config, sampling=sampling or answering, scoring=scoring)
    run_dir, config, models, inputs, identity = _checked(config, models, sampling=sampling, scoring=scoring)
    if sampling:
        _own(run_dir, config, identity)
    resume_from = choose_checkpoint(run_dir.checkpoints)
    fleet, links = _places(config, models)
    try:
        number = fleet.places.teacher_of(dist.get_rank())
        if number is not None:
            link = links[number]
            assert link is not None
            build_host(number, config, models, link).serve()
        else:
            _launch(fleet, config, models, run_dir, inputs, resume_from if sampling else None, launch=True)
            fleet.serve(config)
    finally:
        fleet.close()
        dist.destroy_process_group()


def _for_command(config: RunConfig, *, sampling: bool, scoring: bool) -> RunConfig:
    """Without the ranks that a command has no use for."""
    config = config if sampling else config.without_engine_hosts()
    return config if scoring else config.without_teacher_ranks()


def _places(config: RunConfig, models: ResolvedModels) -> tuple[Fleet, list[TeacherLink | None]]:
    """Makes every group that crosses places, then makes the student's place the world of its ranks. Collective over all
    ranks.

    Raises ConfigError on every rank when the engines do not fit their place.
    """
    world = dist.get_world_size()
    return join_groups(config, models, cut_places(config, world, ranks_per_node(world), on_gpu=has_gpu()))


def join_groups(config: RunConfig, models: ResolvedModels, places: Places) -> tuple[Fleet, list[TeacherLink | None]]:
    """The groups alone. Collective over all ranks."""
    fleet = Fleet.join(config, models, places)
    links = join_teachers(config, models, places)
    if places.student.size < dist.get_world_size():
        narrow_world(places.student.size)
    return fleet, links


def _launch(
    fleet: Fleet, config: RunConfig, models: ResolvedModels, run_dir: RunDir, inputs: RunInputs,
    resume_from: FoundCheckpoint | None, *, launch: bool,
) -> None:  # fmt: skip
    """Launches this rank's engines, unless the run is finished. Collective over the ranks that sample."""
    unfinished = config.uses_engine and (resume_from is None or resume_from.step < config.steps)
    try:
        fleet.build(config, models, run_dir, inputs.banned_ids, launch=launch and unfinished)
    except BaseException:
        fleet.close()
        raise


def _checked(
    config: RunConfig, models: ResolvedModels | None, *, sampling: bool, scoring: bool
) -> tuple[RunDir, RunConfig, ResolvedModels, RunInputs, dict[str, Any]]:
    """Checks everything that needs no model, joins the process group and settles what all ranks must agree on: the run
    directory, the configuration with its precision, models, data, and what the run is."""
    run_dir = RunDir(Path(config.output_dir))
    config, _ = decide_precision(config, run_dir.settings())
    models = models or check_run(config)
    run_dir.check(config, training=sampling)
    inputs = inputs_once_a_node(config, models)
    identity = run_identity(
        config, models, inputs.tokenizer, inputs.prompts, inputs.teacher_tokenizers, given=inputs.given, scoring=scoring
    )
    if scoring:
        config = with_fingerprints(config, teacher_fingerprints(config, models, identity))
    if sampling:
        inputs.notes.extend(run_dir.check_content(identity, config.checkpoint.allow_changed))
    let_transfers_overtake(config.parallel.tensor)
    parallel = config.parallel
    init_distributed(start_timeout=parallel.start_timeout, patience=parallel.collective_timeout)
    check_versions()
    on_machine(config)
    config = _rank_0s_precision(config)
    return run_dir, config, models, inputs, identity | settings_identity(config.model_dump(mode="json"))


def on_machine(config: RunConfig) -> None:
    """Raises ConfigError on every rank unless all of their machines have what the configuration asks of them.
    Collective."""
    with on_all_ranks("this machine cannot run the configuration", ConfigError):
        check_machine(config)


def _own(run_dir: RunDir, config: RunConfig, identity: dict[str, Any]) -> RunLock | None:
    """Makes the run directory this run's: rank 0 holds the lock and writes what the run is. Collective."""
    lock: RunLock | None = None
    with on_all_ranks(f"output_dir={str(run_dir.root)!r} cannot be used", ConfigError):
        if dist.get_rank() == 0:
            run_dir.make()
            lock = RunLock(run_dir.root, print)
            lock.acquire()
            try:
                run_dir.prepare(config, identity)
            except BaseException:
                lock.release()
                raise
    try:
        check_shared(run_dir.root, f"output_dir={config.output_dir!r}")
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return lock


def _rank_0s_precision(config: RunConfig) -> RunConfig:
    """Takes the first rank's decision: machines of one run may differ. Collective."""
    chosen = [config]
    dist.broadcast_object_list(chosen)
    return take_precision(config, chosen[0])


def _grid(config: RunConfig, models: ResolvedModels) -> ParallelGrid:
    parallel = config.parallel
    return ParallelGrid.build(
        parallel.tensor,
        parallel.pipeline,
        models.data_parallel,
        ep_size=parallel.expert,
        cp_size=parallel.context,
        whole_experts=parallel.whole_experts,
        sequence_parallel=parallel.sequence_parallel,
    )


def _models(
    config: RunConfig,
    models: ResolvedModels,
    grid: ParallelGrid,
    links: list[TeacherLink | None],
    inputs: RunInputs,
    scoring: bool,
) -> tuple[Student, list[Teacher]]:
    padded_vocab = models.padded_vocab(grid.tp_size)
    student = Student(config, models.student, models.student_config, grid, padded_vocab)
    return student, build_teachers(config, models, grid, links, student, inputs.pairs) if scoring else []


def _rewards(config: RunConfig, inputs: RunInputs) -> Rewards | None:
    longest, trained = config.rollout.max_new_tokens, config.objective.prefix_tokens
    return Rewards.of(config.rewards, inputs.tokenizer, longest, trained)


def _siblings(inputs: RunInputs) -> Siblings | None:
    dataset = inputs.prompts.dataset
    if not any(template.has_sibling for template in dataset.contexts.values()):
        return None
    return Siblings(dataset, inputs.tokenizer, inputs.rooms)


def _batches(config: RunConfig, models: ResolvedModels, grid: ParallelGrid, views: Views) -> MicroBatchBuilder:
    return MicroBatchBuilder(
        grid.dp_rank,
        grid.dp_size,
        config.micro_batch_size(grid.dp_size),
        one_length=grid.pp_size > 1,
        multiple_of=config.micro_batch_multiple,
        device=device(),
        route_of=None if views.routing is None else views.routing.route_of,
        balance=config.objective.balance,
        in_step=config.parallel.expert > 1,
        tokens=config.pack_tokens,
        attention_length=LayerSizes.of(models.student_config).attention_length,
        context_rank=grid.cp_rank,
        context_size=grid.cp_size,
        sequence_multiple_of=2 * grid.cp_size if grid.cp_size > 1 else 1,
        count_multiple_of=grid.pp_size if config.parallel.virtual_stages > 1 else 1,
    )


def scored_prompts(inputs: RunInputs) -> list[Prompt]:
    """Held-out prompts, or some to train on where there are none."""
    dataset = inputs.prompts.dataset
    return inputs.held_out or [dataset[row] for row in range(min(len(dataset), _EVALUATED_WITHOUT_DATA))]


def _display(config: RunConfig, resume_from: FoundCheckpoint | None, *, trains: bool) -> NullDisplay:
    if dist.get_rank() > 0:
        return NullDisplay()
    return TrainingDisplay(config.steps, resume_from.step if resume_from else 0, config.logging.progress and trains)


def _rollout_client(
    config: RunConfig, fleet: Fleet, student: Student, teachers: list[Teacher], display: NullDisplay
) -> RolloutClient:
    publisher = WeightPublisher(
        student,
        weight_format(config, student.hf_config),
        cpu_group() if dist.get_world_size() > 1 else None,
        bucket_bytes=config.rollout.bucket_mib * 2**20,
        on_event=display.note,
        fan_out=fleet.fan_out,
        device=device(),
    )
    in_turns: list[Student | Teacher] = [student, *teachers] if sleeps(config, on_gpu=has_gpu()) else []

    def make_room() -> None:
        for model in in_turns:
            model.move_out()
        publisher.close()
        free_caches()

    def take_back() -> None:
        for model in in_turns:
            model.move_back()

    return fleet.client(
        config, publisher.stream, display.note, make_room=make_room, take_back=take_back, on_progress=display.answers
    )


def _saver(config: RunConfig, run_dir: RunDir) -> CheckpointSaver:
    settings = config.checkpoint
    best = BestCheckpoint(settings.best_metric, settings.better) if settings.best_metric else None
    return CheckpointSaver(run_dir.checkpoints, keep=settings.keep, best=best, asynchronous=settings.async_save)
