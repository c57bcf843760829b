"""`opd-megatron cache-teacher CONFIG`: the hidden states of a run's cached teachers, written in a pass of their own.

It takes the configuration of the run that will read them, and every rank of the student's: a teacher lies over them in
its own `tensor` and `pipeline`, with as many replicas as fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from opd_megatron.config import (
    CachedTeacherConfig,
    MegatronTeacherConfig,
    RunConfig,
)
from opd_megatron.data.batching import MicroBatchBuilder, StepBatches
from opd_megatron.data.saved_rollouts import read_rollouts
from opd_megatron.errors import ConfigError, DataError, TeacherError
from opd_megatron.mcore.cpu.platform import device, init_distributed
from opd_megatron.mcore.forward import response_hidden
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import Model
from opd_megatron.models import ResolvedModels
from opd_megatron.run.agreement import agreement_sequence
from opd_megatron.run.build import scored_prompts
from opd_megatron.run.evaluation import evaluated, gold
from opd_megatron.run.identity import run_identity, teacher_fingerprints
from opd_megatron.run.inputs import RunInputs, inputs_once_a_node
from opd_megatron.run.lock import RunLock
from opd_megatron.system.collectives import on_all_ranks
from opd_megatron.teacher import Views, check_tasks
from opd_megatron.teacher.source import load_teacher
from opd_megatron.teacher.states_cache import CacheWriter, StatesCache, remove_partial, sequence_key
from opd_megatron.types import Rollout

_MICRO_BATCHES = 8
"""Of each replica, in one piece of work: bounds what is held of states."""
_MICRO_BATCH_SIZE = 8
"""Sequences; how many are worked on between two looks at the progress bar too, where they are packed."""

Cached = dict[int, CachedTeacherConfig]
"""Number of a teacher in `teachers:` -> its entry."""


def as_pass(config: RunConfig) -> tuple[RunConfig, Cached]:
    """Returns the configuration with every cached teacher on the student's ranks, and those that were cached.

    Raises ConfigError where there is none.
    """
    config = config.without_engine_hosts().without_teacher_ranks()
    cached = {n: each for n, each in enumerate(config.teachers) if isinstance(each, CachedTeacherConfig)}
    if not cached:
        raise ConfigError(
            "no teacher of this run is cached: set teachers.N.placement=cached and teachers.N.cache=FOLDER"
        )
    teachers = [cached[n].computing() if n in cached else each for n, each in enumerate(config.teachers)]
    return config.model_copy(update={"teachers": teachers}), cached


def cache_teachers(
    config: RunConfig,
    models: ResolvedModels,
    cached: Cached,
    *,
    rollouts: Sequence[Path] = (),
    answers: bool = True,
    shard_bytes: int = 2**30,
) -> list[str]:
    """Computes and writes what the caches lack of the run's held-out answers and of what is asked for; returns a line
    for each. Collective over the ranks that `config` has. Ends the process group.

    Args:
        config, cached: from `as_pass`, its precision decided.
        rollouts: saved ones: files, or folders of them.
        answers: gold answers of the training data.

    Raises:
        OPDError: on every rank.
    """
    inputs = inputs_once_a_node(config, models)
    identity = run_identity(config, models, inputs.tokenizer, inputs.prompts, inputs.teacher_tokenizers)
    fingerprints = teacher_fingerprints(config, models, identity)
    sequences = _sequences(config, inputs, rollouts, answers=answers)
    parallel = config.parallel
    init_distributed(start_timeout=parallel.start_timeout, patience=parallel.collective_timeout)
    try:
        return [
            _Pass(config, models, inputs, number, entry, fingerprints[number]).run(
                sequences, agreement_sequence(inputs.prompts.dataset[0]), shard_bytes
            )
            for number, entry in cached.items()
        ]
    finally:
        dist.destroy_process_group()


def _sequences(config: RunConfig, inputs: RunInputs, paths: Sequence[Path], *, answers: bool) -> list[Rollout]:
    """What a run can ask of a teacher, the longest first: they need most memory."""
    dataset, longest = inputs.prompts.dataset, config.rollout.max_new_tokens
    found = evaluated(config, scored_prompts(inputs))
    if answers:
        found += [gold(prompt) for prompt in dataset if prompt.answer_ids]
    given = inputs.given.saved if inputs.given is not None else None
    if given:
        known = {prompt.id: prompt for prompt in (dataset[row] for row in dataset.rows_of(given))}
        found += [
            replace(each, prompt=known[name], response_ids=each.response_ids[:longest], logprobs=None)
            for name, rollouts in given.items() if name in known for each in rollouts
        ]  # fmt: skip
    if paths:
        own_prompts = any((teacher.prompt, teacher.alignment) != (None, None) for teacher in config.teachers)
        known = {prompt.id: prompt for prompt in dataset} if own_prompts else {}
        for path in paths:
            for rollout in read_rollouts(path):
                prompt = known.get(rollout.prompt.id)
                if own_prompts and (prompt is None or prompt.token_ids != rollout.prompt.token_ids):
                    raise DataError(
                        f"the saved answer to prompt {rollout.prompt.id!r} of {str(path)!r} belongs to other data or "
                        "another template than this run's, so that a teacher's own prompt cannot be made: use the "
                        "configuration of the run that saved it"
                    )
                ids = rollout.response_ids[:longest]
                found.append(replace(rollout, prompt=prompt or rollout.prompt, response_ids=ids, logprobs=None))
    check_tasks(config, [each.prompt.task for each in found])  # saved ones may be of other data
    return sorted(found, key=lambda each: -len(each.prompt.token_ids) - len(each.response_ids))


class _Pass:
    """One teacher's."""

    def __init__(
        self, config: RunConfig, models: ResolvedModels, inputs: RunInputs, number: int, entry: CachedTeacherConfig,
        fingerprint: str,
    ) -> None:  # fmt: skip
        self._config, self._models, self._number, self._entry = config, models, number, entry
        self._fingerprint, self._folder = fingerprint, Path(entry.cache)
        self._name = repr(entry.path)
        parallel = config.parallel
        tensor, pipeline = entry.tensor or parallel.tensor, entry.pipeline or parallel.pipeline
        replicas = dist.get_world_size() // (tensor * pipeline)
        self._grid = ParallelGrid.build(tensor, pipeline, replicas, ep_size=parallel.expert)
        self._views = Views.of_run(config, models, inputs.pairs)

    def run(self, sequences: Sequence[Rollout], agreement: Rollout, shard_bytes: int) -> str:
        """Writes what is missing; returns a line on it."""
        lock: RunLock | None = None
        with on_all_ranks(f"teachers.{self._number}.cache={str(self._folder)!r} cannot be used", ConfigError):
            if dist.get_rank() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                lock = RunLock(self._folder, print, key=f"teachers.{self._number}.cache")
                lock.acquire()
                remove_partial(self._folder)
        try:
            return self._written(sequences, agreement, shard_bytes)
        finally:
            if lock is not None:
                lock.release()

    def _written(self, sequences: Sequence[Rollout], agreement: Rollout, shard_bytes: int) -> str:
        width = self._models.teachers[self._number][1].hidden_size
        with on_all_ranks(f"{str(self._folder)!r} cannot be read", TeacherError):
            cache = StatesCache(self._folder, fingerprint=self._fingerprint, width=width, name=self._name)
        teacher = self._config.teachers[self._number]
        assert isinstance(teacher, MegatronTeacherConfig)
        model = load_teacher(teacher, self._models.teachers[self._number], self._models, self._grid, self._config)
        described = {"fingerprint": self._fingerprint, "teacher": self._entry.path}
        writer = CacheWriter(self._folder, dist.get_rank(), described, shard_bytes)
        builder = self._builder()
        shown = self._views.of(self._number, builder.build_any_number([agreement]), routed=False)[0]
        self._score(model, shown, cache, writer)
        size = self._grid.dp_size * builder.size * _MICRO_BATCHES
        with Progress(console=Console(stderr=True), disable=dist.get_rank() > 0) as progress:
            bar = progress.add_task(f"teacher {self._entry.path}", total=len(sequences))
            for begin in range(0, len(sequences), size):
                piece = sequences[begin : begin + size]
                self._score(model, self._views.of(self._number, builder.build_any_number(piece))[0], cache, writer)
                progress.advance(bar, len(piece))
        with self._disk_errors():
            writer.flush()
        return self._line(writer, len(cache))

    def _score(self, model: Model, step: StepBatches, cache: StatesCache, writer: CacheWriter) -> None:
        """Writes what a piece of work has that the cache lacks; the same on every rank."""
        view = step.view(lambda each: None if sequence_key(each) in cache else each)
        if not view.dealt:
            return
        states = response_hidden(model, self._grid, view)
        with self._disk_errors():
            if self._grid.is_last_stage and self._grid.tp_rank == 0:
                for portion, rows in zip(view.deal[self._grid.dp_rank], states, strict=True):
                    if portion.rollouts:
                        writer.add([view.rollouts[i] for i in portion.rollouts], rows)

    def _disk_errors(self) -> Any:
        return on_all_ranks(f"cannot write {str(self._folder)!r}", TeacherError, remedy="choose another folder")

    def _builder(self) -> MicroBatchBuilder:
        grid, routing = self._grid, self._views.routing
        return MicroBatchBuilder(
            grid.dp_rank,
            grid.dp_size,
            self._config.parallel.micro_batch_size or _MICRO_BATCH_SIZE,
            one_length=grid.pp_size > 1,
            multiple_of=self._entry.precision.alignment,
            device=device(),
            route_of=None if routing is None else routing.route_of,
            in_step=self._config.parallel.expert > 1,
            tokens=self._config.pack_tokens,
        )

    def _line(self, writer: CacheWriter, before: int) -> str:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (len(writer), writer.tokens, writer.nbytes))
        sequences, tokens, nbytes = (sum(each[part] for each in found) for part in range(3))
        return (
            f"teacher {self._entry.path}: {sequences} sequences of {tokens} answer tokens, {nbytes / 1e6:.1f} MB, "
            f"written to {self._folder}" + (f"; {before} were there" if before else "")
        )
