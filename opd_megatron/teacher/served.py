"""A teacher that vLLM servers run somewhere else (`placement: served`): final hidden states over HTTP, still exact.

The servers run in pooling mode (docs/teachers.md has the command) and answer token ids with the hidden states of every
position; the LM head comes from the checkpoint, as for every teacher. The first tensor-parallel rank of the student's
last stage asks, a bounded number of micro batches ahead, and hands the response rows to the others.
"""

from __future__ import annotations

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
from opd_megatron.mcore.cpu.platform import device
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import sequence_shards
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, RunSizes
from opd_megatron.system.pooling_client import PoolingClient
from opd_megatron.teacher.base import Surroundings, Teacher, TeacherCost
from opd_megatron.teacher.source import rows_of
from opd_megatron.types import DTYPES, Batch, TeacherInputs


class ServedTeacher:
    """The student's side of it."""

    beside = True
    changes = False

    def __init__(
        self, client: PoolingClient, head: torch.Tensor | None, student: ParallelGrid, weight: float,
        *, width: int, dtype: torch.dtype, name: str,
    ) -> None:  # fmt: skip
        self._client, self._head, self._student, self._weight = client, head, student, weight
        self._width, self._dtype, self._name = width, dtype, name
        self._answers: _Answers | None = None

    def submit(self, micro_batches: list[Batch]) -> None:
        """Sends the first requests; waits for none."""
        assert isinstance(micro_batches, StepBatches)
        if not self._student.is_last_stage:
            return
        mine = len(micro_batches.numbers(self._student.dp_rank))
        self._answers = _Answers(self._client, micro_batches, mine, self._student, self._width, self._dtype, self._name)

    def collect(self) -> TeacherInputs:
        """Hands over what gives each micro batch's states when the loss asks for them, once and in order."""
        answers, self._answers = self._answers, None
        if answers is None:
            return TeacherInputs((), self._weight, lambda: {"bytes": 0.0, "waited": 0.0})
        assert self._head is not None
        return TeacherInputs(
            _WithHead(answers, self._head), self._weight,
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


class _Answers:
    """Response rows of each micro batch, asked for in order; the next ones are on their way meanwhile."""

    def __init__(
        self, client: PoolingClient, step: StepBatches, count: int, student: ParallelGrid, width: int,
        dtype: torch.dtype, name: str,
    ) -> None:  # fmt: skip
        self._client, self._step, self._count, self._student = client, step, count, student
        self._width, self._dtype, self._name = width, dtype, name
        self._sequences = [_sequences(step, index) for index in range(count)]
        self._arriving: deque[Future[torch.Tensor]] = deque()
        self._asked = self._taken = 0
        self.nbytes, self.waited = 0, 0.0
        """Of what has come, and seconds spent on waiting for it."""
        self._ask()

    def __len__(self) -> int:
        return self._count

    def take(self, index: int) -> torch.Tensor:
        """[T, h], or under sequence parallelism this rank's rows. Collective over the tensor-parallel ranks."""
        assert index == self._taken, f"micro batch {index} is asked for where {self._taken} is next"
        self._taken += 1
        batch = self._step[index]
        begin = time.perf_counter()
        rows, error = self._come() if self._student.tp_rank == 0 else (None, None)
        self.waited += time.perf_counter() - begin
        self._ask()
        return self._handed_round(rows, error, batch)

    def _come(self) -> tuple[torch.Tensor | None, TeacherError | None]:
        try:
            rows = self._arriving.popleft().result()
        except TeacherError as error:
            return None, error
        self.nbytes += rows.nbytes
        return rows.to(device()), None

    def _ask(self) -> None:
        if self._student.tp_rank != 0:
            return
        while self._asked < min(self._count, self._taken + self._client.in_flight):
            sequences = self._sequences[self._asked]
            self._arriving.append(self._client.submit(sequences, self._width, self._dtype))
            self._asked += 1

    def _handed_round(self, rows: torch.Tensor | None, error: TeacherError | None, batch: Batch) -> torch.Tensor:
        student, mask = self._student, batch.weights > 0
        sharded = student.sequence_parallel
        if student.tp_size == 1:
            if error is not None:
                raise error
            assert rows is not None
            return rows
        group = student.groups.tp
        failed = torch.tensor([int(error is not None)], device=device())
        dist.broadcast(failed, group_src=0, group=group)
        if int(failed):
            raise error or TeacherError(f"teacher {self._name} gave no hidden states: see the first rank's message")
        ranks = student.tp_size if sharded else 1
        mine = torch.empty(rows_of(batch, ranks), self._width, dtype=self._dtype, device=device())
        if sharded:
            parts = None if rows is None else [part.contiguous() for part in sequence_shards(rows, mask, ranks)]
            dist.scatter(mine, parts, group_src=0, group=group)
            return mine
        if rows is not None:
            mine = rows.contiguous()
        dist.broadcast(mine, group_src=0, group=group)
        return mine


class _WithHead(Sequence[Any]):
    """(states, head) of each micro batch."""

    def __init__(self, answers: _Answers, head: torch.Tensor) -> None:
        self._answers, self._head = answers, head

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self._answers):
            raise IndexError(index)
        return self._answers.take(index), self._head


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

    def build(
        self, teacher: ServedTeacherConfig, source: tuple[Path, PretrainedConfig], weight: float,
        surroundings: Surroundings,
    ) -> Teacher:  # fmt: skip
        """Loads the head, and asks every server for the states of two tokens: who does not answer is told of now."""
        dtype, grid, width = DTYPES[decided(teacher.dtype)], surroundings.grid, source[1].hidden_size
        client = PoolingClient(
            teacher.urls, name=repr(teacher.path), in_flight=teacher.in_flight, timeout=teacher.request_timeout,
            retries=teacher.retries,
        )  # fmt: skip
        if grid.is_last_stage and grid.tp_rank == 0:
            client.try_servers(width, dtype)
        head = surroundings.heads.of(*source, decided(teacher.dtype))
        return ServedTeacher(client, head, grid, weight, width=width, dtype=dtype, name=repr(teacher.path))

    def cost(
        self, teacher: ServedTeacherConfig, hf_config: PretrainedConfig, sizes: RunSizes, stage: int
    ) -> TeacherCost:
        """Estimates what is on the student's ranks: its head, and the states of one micro batch."""
        element, last = BYTES_PER_ELEMENT[decided(teacher.dtype)], stage == sizes.pp_size - 1
        states = sizes.response_tokens * hf_config.hidden_size * element
        return TeacherCost(
            memory={
                "teachers": 0.0,
                "teacher heads": sizes.vocab_per_rank * hf_config.hidden_size * element if last else 0.0,
                "teacher states": states if last else 0.0,
            },
            logits_bytes=sizes.vocab_per_rank * element,
            flops=sizes.head_flops(hf_config),
            states_bytes=states * sizes.micro_batches if last else 0.0,
        )
