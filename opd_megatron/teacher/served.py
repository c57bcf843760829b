"""A teacher that vLLM servers run somewhere else (`placement: served`): final hidden states over HTTP, still exact; or
only its likeliest tokens (`top_k`), where a server gives no more.

The servers run in pooling mode (docs/teachers.md has the command) and answer token ids with the hidden states of every
position; the LM head comes from the checkpoint, as for every teacher. The first tensor-parallel rank of the student's
last stage asks, a bounded number of micro batches ahead, and hands the response rows to the others.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from opd_megatron.config import RunConfig, ServedTeacherConfig, decided
from opd_megatron.data.batching import StepBatches
from opd_megatron.errors import ConfigError, TeacherError
from opd_megatron.losses import TopKTeacher
from opd_megatron.mcore.cpu.platform import device
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import sequence_shards
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, RunSizes
from opd_megatron.teacher.base import Surroundings, Teacher, TeacherCost
from opd_megatron.teacher.served_client import HiddenStates, TeacherServers, TopTokens
from opd_megatron.teacher.source import WHOLE, rows_of, student_rows
from opd_megatron.types import DTYPES, Batch, TeacherInputs


class ServedTeacher:
    """The student's side of it."""

    beside = True
    changes = False

    def __init__(
        self, client: TeacherServers, question: HiddenStates | TopTokens, head: torch.Tensor | None,
        student: ParallelGrid, weight: float, *, name: str,
    ) -> None:  # fmt: skip
        """`head`: on the last stage, for hidden states."""
        self._client, self._question, self._head = client, question, head
        self._student, self._weight, self._name = student, weight, name
        self._answers: _Answers | None = None

    def submit(self, micro_batches: list[Batch]) -> None:
        """Sends the first requests; waits for none."""
        assert isinstance(micro_batches, StepBatches)
        if not self._student.is_last_stage:
            return
        mine = len(micro_batches.numbers(self._student.dp_rank))
        self._answers = _Answers(
            self._client, self._question, micro_batches, mine, self._student, self._head, self._name
        )  # fmt: skip

    def collect(self) -> TeacherInputs:
        """Hands over what gives each micro batch's states when the loss asks for them, once and in order."""
        answers, self._answers = self._answers, None
        if answers is None:
            return TeacherInputs((), self._weight, lambda: {"bytes": 0.0, "waited": 0.0})
        return TeacherInputs(
            answers, self._weight,
            lambda: {"bytes": float(answers.nbytes), "waited": answers.waited},
        )  # fmt: skip

    def after_step(self) -> None:
        """Does nothing: it does not change."""

    def move_out(self) -> None:
        """Does nothing: it is elsewhere."""

    def move_back(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Gives the connections back. Safe to call twice."""
        self._client.close()


class _Answers(Sequence[Any]):
    """What the loss takes of each micro batch, asked for in order; the next ones are on their way meanwhile."""

    def __init__(
        self, client: TeacherServers, question: HiddenStates | TopTokens, step: StepBatches, count: int,
        student: ParallelGrid, head: torch.Tensor | None, name: str,
    ) -> None:  # fmt: skip
        self._client, self._question, self._step, self._count = client, question, step, count
        self._student, self._head, self._name = student, head, name
        self._whole: list[Batch] = list(step)
        if student.cp_size > 1:
            self._whole = step.of(student.dp_rank, device=torch.device("cpu"), **WHOLE)
        self._sequences = [_sequences(step, index) for index in range(count)]
        self._arriving: deque[Future[Any]] = deque()
        self._asked = self._taken = 0
        self.nbytes, self.waited = 0, 0.0
        """Of what has come, and seconds spent on waiting for it."""
        self._ask()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """Of one micro batch: (states, head), under sequence parallelism of this rank's rows; or a `TopKTeacher`.
        Collective over the tensor-parallel ranks."""
        if index >= self._count:
            raise IndexError(index)
        assert index == self._taken, f"micro batch {index} is asked for where {self._taken} is next"
        self._taken += 1
        batch = self._step[index]
        begin = time.perf_counter()
        rows, error = self._come() if self._asks else (None, None)
        self.waited += time.perf_counter() - begin
        self._ask()
        self._raise_together(error)
        if isinstance(self._question, TopTokens):
            shape = (int(self._whole[index].response_mask.sum()), self._question.k + 1)
            ids, logprobs = rows if rows is not None else (None, None)
            entries = [
                self._mine(self._to_everyone(part, shape, dtype), index)
                for part, dtype in ((ids, torch.int64), (logprobs, torch.float32))
            ]
            return TopKTeacher(*entries)
        return self._states(None if rows is None else rows[0], batch, index, self._question), self._head

    @property
    def _asks(self) -> bool:
        return self._student.tp_rank == 0 and self._student.cp_rank == 0

    def _mine(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """Selects this context-parallel rank's rows of a whole micro batch's."""
        student, batch = self._student, self._whole[index]
        return student_rows(rows, batch, 1, student.cp_rank, student.cp_size, sharded=False)[0]

    def _come(self) -> tuple[tuple[torch.Tensor, ...] | None, TeacherError | None]:
        try:
            found = self._arriving.popleft().result()
        except TeacherError as error:
            return None, error
        parts = (found,) if isinstance(found, torch.Tensor) else found
        self.nbytes += sum(part.nbytes for part in parts)
        return tuple(part.to(device()) for part in parts), None

    def _ask(self) -> None:
        if not self._asks:
            return
        while self._asked < min(self._count, self._taken + self._client.in_flight):
            sequences = self._sequences[self._asked]
            self._arriving.append(self._client.submit(self._question, sequences))
            self._asked += 1

    def _raise_together(self, error: TeacherError | None) -> None:
        """Tells the other tensor-parallel ranks of an error before they wait for what does not come."""
        group = self._student.groups.tp_cp
        if group.size() > 1:
            failed = torch.tensor([int(error is not None)], device=device())
            dist.broadcast(failed, group_src=0, group=group)
            if int(failed) and error is None:
                error = TeacherError(f"teacher {self._name} gave nothing: see the message of the rank that asked")
        if error is not None:
            raise error

    def _states(self, rows: torch.Tensor | None, batch: Batch, index: int, question: HiddenStates) -> torch.Tensor:
        student = self._student
        ranks = student.tp_size if student.sequence_parallel else 1
        if ranks == 1 or student.cp_size > 1:
            shape = (int(self._whole[index].response_mask.sum()), question.width)
            mine = self._mine(self._to_everyone(rows, shape, question.dtype), index)
            return sequence_shards(mine, batch.response_mask, ranks)[student.tp_rank] if ranks > 1 else mine
        shape = (rows_of(batch, ranks), question.width)
        mine = torch.empty(shape, dtype=question.dtype, device=device())
        parts = None
        if rows is not None:
            parts = [part.contiguous() for part in sequence_shards(rows, batch.response_mask, ranks)]
        dist.scatter(mine, parts, group_src=0, group=student.groups.tp)
        return mine

    def _to_everyone(self, rows: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        rows = torch.empty(shape, dtype=dtype, device=device()) if rows is None else rows.contiguous()
        if self._student.groups.tp_cp.size() > 1:
            dist.broadcast(rows, group_src=0, group=self._student.groups.tp_cp)
        return rows


def _sequences(step: StepBatches, index: int) -> list[tuple[list[int], int]]:
    """Token ids of a micro batch's sequences, and how many of their last ones are the answer."""
    rollouts = [step.rollouts[i] for i in step.deal[step.builder.dp_rank][index].rollouts]
    return [([*each.prompt.token_ids, *each.response_ids.tolist()], len(each.response_ids)) for each in rollouts]


class Served:
    """`placement: served`."""

    def check(
        self, number: int, teacher: ServedTeacherConfig, hf_config: PretrainedConfig, config: RunConfig,
        data_parallel: int,
    ) -> None:  # fmt: skip
        """Requires addresses that are some."""
        for url in teacher.urls:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(
                    f"teachers.{number}.urls has {url!r}, which is no address: write it as http://HOST:PORT"
                )
        if teacher.api_key_env and teacher.api_key_env not in os.environ:
            raise ConfigError(
                f"teachers.{number}.api_key_env={teacher.api_key_env} is not set in the environment: export it, or "
                "leave the key out"
            )
        if teacher.top_k is None:
            return
        if config.objective.temperature != 1:
            raise ConfigError(
                f"objective.temperature={config.objective.temperature} must be 1 with teachers.{number}.top_k, whose "
                "log-probabilities are at 1: set it, or serve hidden states"
            )
        name = config.teacher_names[number]
        if any(name in names and len(names) > 1 for names in config.teacher_sets):
            raise ConfigError(
                f"teachers.{number}.top_k={teacher.top_k} cannot be one of an ensemble of whole distributions: "
                "serve its hidden states, or give it a route of its own"
            )

    def build(
        self, teacher: ServedTeacherConfig, source: tuple[Path, PretrainedConfig], weight: float,
        surroundings: Surroundings,
    ) -> Teacher:  # fmt: skip
        """Loads the head where it is wanted, and asks every server a little, so that one that is down is named now."""
        dtype, grid, width = DTYPES[decided(teacher.dtype)], surroundings.grid, source[1].hidden_size
        client = TeacherServers(
            teacher.urls, name=repr(teacher.path), in_flight=teacher.in_flight, timeout=teacher.request_timeout,
            retries=teacher.retries, key=os.environ[teacher.api_key_env] if teacher.api_key_env else None,
        )  # fmt: skip
        question = HiddenStates(width, dtype) if teacher.top_k is None else TopTokens(teacher.top_k)
        if grid.is_last_stage and grid.tp_rank == 0 and grid.cp_rank == 0:
            client.try_all(question)
        head = surroundings.heads.of(*source, decided(teacher.dtype)) if teacher.top_k is None else None
        return ServedTeacher(client, question, head, grid, weight, name=repr(teacher.path))

    def cost(
        self, teacher: ServedTeacherConfig, hf_config: PretrainedConfig, sizes: RunSizes, stage: int
    ) -> TeacherCost:
        """Estimates what is on the student's ranks: its head, and the states of one micro batch."""
        element, last = BYTES_PER_ELEMENT[decided(teacher.dtype)], stage == sizes.pp_size - 1
        states = sizes.response_tokens * hf_config.hidden_size * element
        if teacher.top_k is not None:
            entries = sizes.response_tokens * (teacher.top_k + 1) * (8 + 4)
            return TeacherCost({"teacher states": entries if last else 0.0}, states_bytes=entries * sizes.micro_batches)
        return TeacherCost(
            memory={
                "teachers": 0.0,
                "teacher heads": sizes.head_columns(hf_config) * hf_config.hidden_size * element if last else 0.0,
                "teacher states": states if last else 0.0,
            },
            logits_bytes=sizes.head_columns(hf_config) * element,
            flops=sizes.head_flops(hf_config),
            states_bytes=states * sizes.micro_batches if last else 0.0,
        )
