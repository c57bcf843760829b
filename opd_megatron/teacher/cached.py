"""A teacher whose final hidden states lie on disk (`placement: cached`): a pass of its own has computed them, and the
run needs the LM head alone. What the pass has not seen is an error, or is computed on the student's ranks
(`missing: compute`).

Ranks look up every sequence of a step before any of them reads one, so that they raise the same error together.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from opd_megatron.config import CachedTeacherConfig, RunConfig, decided
from opd_megatron.data.batching import StepBatches, make_batch
from opd_megatron.data.context import local_rows
from opd_megatron.errors import ConfigError, TeacherError
from opd_megatron.mcore.cpu.platform import device
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import gathered_rows, sequence_shards
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, RunSizes
from opd_megatron.system.collectives import on_all_ranks
from opd_megatron.teacher.base import Surroundings, Teacher, TeacherCost
from opd_megatron.teacher.states_cache import StatesCache, answer_key, sequence_key
from opd_megatron.teacher.student_ranks import StudentRanks
from opd_megatron.types import DTYPES, Batch, Rollout, TeacherInputs


class CachedTeacher:
    """The student's side of it."""

    changes = False

    def __init__(
        self, cache: StatesCache, head: torch.Tensor | None, student: ParallelGrid, weight: float, *,
        dtype: torch.dtype, name: str, computes: Teacher | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            head: on the last stage.
            dtype: that the loss takes states in.
            name: of the teacher, for errors.
            computes: the same teacher, for sequences that the cache lacks.
        """
        self._cache, self._head, self._student, self._weight = cache, head, student, weight
        self._dtype, self._name, self._computes = dtype, name, computes
        self.beside = computes is None
        self._states: _States | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="cached-teacher")

    def holds(self, rollout: Rollout) -> bool:
        """Whether it can score a sequence."""
        return self._computes is not None or sequence_key(rollout) in self._cache

    def submit(self, micro_batches: list[Batch]) -> None:
        """Looks the step up, has what is missing computed, and begins to read. Raises TeacherError on every rank."""
        assert isinstance(micro_batches, StepBatches)
        step, rollouts = micro_batches, micro_batches.rollouts
        lacks = {id(rollouts[i]) for i in step.dealt if sequence_key(rollouts[i]) not in self._cache}
        computed = _Computed.nothing()
        if lacks:
            if self._computes is None:
                raise self._missing(next(each for each in rollouts if id(each) in lacks), len(lacks), len(step.dealt))
            view = step.view(lambda each: each if id(each) in lacks else None)
            self._computes.submit(view)
            computed = _Computed(view, self._computes.collect().outputs, lacks)
        if self._student.is_last_stage:
            self._states = _States(self._cache, step, computed, self._head, self._student, self._dtype, self._reader)

    def collect(self) -> TeacherInputs:
        """Hands over what reads each micro batch's states when the loss asks for them, once and in order."""
        states, self._states = self._states, None
        if states is None:
            return TeacherInputs((), self._weight, lambda: {"bytes": 0.0, "waited": 0.0})
        return TeacherInputs(
            states, self._weight, lambda: {"bytes": float(states.nbytes), "waited": states.waited}
        )  # fmt: skip

    def after_step(self) -> None:
        """Does nothing: it does not change."""

    def move_out(self) -> None:
        """Lets the one that computes what is missing make room."""
        if self._computes is not None:
            self._computes.move_out()

    def move_back(self) -> None:
        """Undoes that."""
        if self._computes is not None:
            self._computes.move_back()

    def close(self) -> None:
        """Ends the thread that reads. Safe to call twice."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        if self._computes is not None:
            self._computes.close()

    def _missing(self, first: Rollout, count: int, total: int) -> TeacherError:
        where = (
            f"teacher {self._name} has no cached states of {count} of {total} sequences in {str(self._cache.folder)!r}"
        )
        if self._cache.has_answer(answer_key(first)):
            return TeacherError(
                f"{where}; the answer to prompt {first.prompt.id!r} lies there after another context: run "
                "`opd-megatron cache-teacher` with the data, template and teachers.N.prompt of this run"
            )
        return TeacherError(
            f"{where}, the first is the answer to prompt {first.prompt.id!r}: add them with `opd-megatron "
            "cache-teacher`, which takes gold answers and saved rollouts, or set teachers.N.missing=compute"
        )


class _Computed:
    """States that were not in the cache: of a view of the step that has these sequences alone."""

    def __init__(self, view: StepBatches | None, outputs: Sequence[Any], lacks: Collection[int]) -> None:
        self.lacks, self._view, self._outputs = lacks, view, outputs
        numbers = [] if view is None else view.numbers(view.builder.dp_rank)
        self._places = {number: place for place, number in enumerate(numbers)}

    @staticmethod
    def nothing() -> _Computed:
        return _Computed(None, (), ())

    def rows(self, number: int, student: ParallelGrid) -> torch.Tensor | None:
        """[T, h] of one of the student's micro batches, on every tensor-parallel rank. Collective over these."""
        place = self._places.get(number)
        if place is None:
            return None
        assert self._view is not None
        states: torch.Tensor = self._outputs[place][0]
        if student.sequence_parallel:
            return gathered_rows(states, self._view[place].response_mask, student.groups.tp)
        return states


class _States(Sequence[Any]):
    """(states, head) of each micro batch, read in order; the next one's are read while one is in use."""

    def __init__(
        self, cache: StatesCache, step: StepBatches, computed: _Computed, head: torch.Tensor | None,
        student: ParallelGrid, dtype: torch.dtype, reader: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        self._cache, self._step, self._computed, self._head = cache, step, computed, head
        self._student, self._dtype, self._reader = student, dtype, reader
        self._portions = [portion for portion in step.deal[student.dp_rank] if portion.number >= 0]
        self._taken = 0
        self.nbytes, self.waited = 0, 0.0
        """Read, and seconds spent on waiting for it."""
        self._next = self._read_ahead(0)

    def __len__(self) -> int:
        return len(self._portions)

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of one micro batch; under sequence parallelism this rank's rows. Collective over the tensor-parallel ranks
        where some of it was computed."""
        if index >= len(self):
            raise IndexError(index)
        assert index == self._taken, f"micro batch {index} is asked for where {self._taken} is next"
        assert self._next is not None
        self._taken += 1
        begin = time.perf_counter()
        parts = self._next.result()
        self.waited += time.perf_counter() - begin
        self._next = self._read_ahead(index + 1)
        rows = torch.cat(self._filled(index, parts))
        ranks = self._student.tp_size if self._student.sequence_parallel else 1
        if ranks > 1:
            rows = sequence_shards(rows, self._step[index].response_mask, ranks)[self._student.tp_rank]
        return rows, self._head

    def _filled(self, index: int, parts: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Puts what was computed between what was read, of this context-parallel rank's rows."""
        portion = self._portions[index]
        computed = self._computed.rows(portion.number, self._student)
        found, begin = [], 0
        for i, part in zip(portion.rollouts, parts, strict=True):
            rows = self._rows(self._step.rollouts[i])
            if part is None:
                assert computed is not None
                count = len(self._step.rollouts[i].response_ids) if rows is None else len(rows)
                found.append(computed[begin : begin + count].to(self._dtype))
                begin += count
            else:
                self.nbytes += part.nbytes
                found.append((part if rows is None else part[rows]).to(device(), self._dtype))
        return found

    def _rows(self, rollout: Rollout) -> torch.Tensor | None:
        """Which tokens of an answer this context-parallel rank holds; None for all."""
        student, multiple_of = self._student, self._step.builder.sequence_multiple_of
        if student.cp_size == 1:
            return None
        alone = make_batch([rollout], sequence_multiple_of=multiple_of, packed=True)
        assert alone.lengths is not None
        return local_rows(alone.response_mask, alone.lengths, student.cp_rank, student.cp_size)

    def _read_ahead(self, index: int) -> Future[list[torch.Tensor | None]] | None:
        return self._reader.submit(self._read, index) if index < len(self) else None

    def _read(self, index: int) -> list[torch.Tensor | None]:
        rollouts = [self._step.rollouts[i] for i in self._portions[index].rollouts]
        return [
            None if id(each) in self._computed.lacks else self._cache.states(sequence_key(each)) for each in rollouts
        ]


class Cached:
    """`placement: cached`."""

    def check(
        self, number: int, teacher: CachedTeacherConfig, hf_config: PretrainedConfig, config: RunConfig,
        data_parallel: int,
    ) -> None:  # fmt: skip
        """Requires of one that computes what is missing what its layout requires."""
        if "{sibling}" in (teacher.prompt or ""):
            raise ConfigError(
                f"teachers.{number}.prompt uses {{sibling}}, which is known in the run alone, so that there is nothing "
                "to cache: choose another placement"
            )
        if teacher.missing == "compute":
            StudentRanks().check(number, teacher.computing(), hf_config, config, data_parallel)

    def build(
        self, teacher: CachedTeacherConfig, source: tuple[Path, PretrainedConfig], weight: float,
        surroundings: Surroundings,
    ) -> Teacher:  # fmt: skip
        """Reads what the cache holds, and the head where it is wanted. Raises TeacherError on every rank."""
        name = repr(teacher.path)
        with on_all_ranks(f"the cache of teacher {name} cannot be read", TeacherError):
            cache = _opened(teacher, source[1].hidden_size, name)
        _check_same_everywhere(cache, name)
        computes = None
        if teacher.missing == "compute":
            computes = StudentRanks().build(teacher.computing(), source, weight, surroundings)
        dtype = decided(teacher.dtype)
        head = surroundings.heads.of(*source, dtype)
        return CachedTeacher(
            cache, head, surroundings.grid, weight, dtype=DTYPES[dtype], name=name, computes=computes
        )  # fmt: skip

    def cost(
        self, teacher: CachedTeacherConfig, hf_config: PretrainedConfig, sizes: RunSizes, stage: int
    ) -> TeacherCost:
        """Estimates its head and the states of one micro batch; all sequences of a step are taken to be cached, and
        the weights to be there where they compute what is not."""
        element, last = BYTES_PER_ELEMENT[decided(teacher.dtype)], stage == sizes.pp_size - 1
        states = sizes.response_tokens * hf_config.hidden_size * element if last else 0.0
        head = sizes.head_columns(hf_config) * hf_config.hidden_size * element if last else 0.0
        alone = TeacherCost(
            memory={"teachers": 0.0, "teacher heads": head, "teacher states": states},
            logits_bytes=sizes.head_columns(hf_config) * element,
            flops=sizes.head_flops(hf_config),
            states_bytes=states * sizes.micro_batches,
        )
        if teacher.missing == "error":
            return alone
        computing = StudentRanks().cost(teacher.computing(), hf_config, sizes, stage)
        memory = alone.memory | {"teachers": computing.memory["teachers"]}
        return replace(alone, memory=memory, away=min(computing.away, memory["teachers"]), layout=computing.layout)


def _opened(teacher: CachedTeacherConfig, width: int, name: str) -> StatesCache:
    cache = StatesCache(Path(teacher.cache), fingerprint=teacher.fingerprint, width=width, name=name)
    if not len(cache):
        raise TeacherError(
            f"{teacher.cache!r} holds no cached states of teacher {name}: `opd-megatron cache-teacher CONFIG` with "
            "this configuration writes them"
        )
    return cache


def _check_same_everywhere(cache: StatesCache, name: str) -> None:
    """Ranks that found different shards would not agree on what is missing. Collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, cache.digest())
    other = next((rank for rank, digest in enumerate(found) if digest != found[0]), None)
    if other is not None:
        raise TeacherError(
            f"ranks 0 and {other} find different sequences in {str(cache.folder)!r} (teacher {name}): it must be a "
            "folder that all ranks share, and no pass may write into it meanwhile"
        )
