"""A teacher on ranks of its own: it scores micro batch after micro batch while the student trains on the ones before.

rank 0             "score", then the step's tokens           -> the teacher's ranks
teacher's ranks    run their replica's micro batches         -> states, point to point, a few on their way
student's last     takes micro batch i where its loss wants it, and has asked for the next ones
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from opd_megatron.config import OwnRanksTeacherConfig, ParallelConfig, RunConfig, decided
from opd_megatron.data.batching import MicroBatchBuilder, Portion, StepBatches
from opd_megatron.errors import ConfigError, TeacherError, one_line
from opd_megatron.mcore.cpu.platform import device
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.models import ResolvedModels, check_divisible
from opd_megatron.models.sizes import BYTES_PER_ELEMENT, LayerSizes, RunSizes
from opd_megatron.teacher.base import Surroundings, Teacher, TeacherCost
from opd_megatron.teacher.links import TeacherLink
from opd_megatron.teacher.route import Job
from opd_megatron.teacher.source import StatesSource, load_teacher, rows_of, work_of
from opd_megatron.teacher.wire import Expected, Inbox, Outbox
from opd_megatron.types import DTYPES, Batch, Prompt, Rollout, TeacherInputs

_Packed = tuple[list[list[tuple[int, list[int]]]], list[int], list[int], torch.Tensor]
"""Every student replica's micro batches (number, rollouts), lengths of prompts, of answers, all tokens (int32)."""


class DistantTeacher:
    """The student's side."""

    beside = True
    changes = False

    def __init__(
        self, link: TeacherLink, head: torch.Tensor | None, student: ParallelGrid, weight: float,
        *, width: int, dtype: torch.dtype, in_flight: int, name: str,
    ) -> None:  # fmt: skip
        self._link, self._head, self._student, self._weight = link, head, student, weight
        self._width, self._dtype, self._in_flight, self._name = width, dtype, in_flight, name
        self._inbox: Inbox | None = None

    def submit(self, micro_batches: list[Batch]) -> None:
        """Tells the teacher's ranks what to score and asks for the first states; waits for none."""
        assert isinstance(micro_batches, StepBatches)
        assert self._link.calls is not None
        if dist.get_rank() == 0:
            self._link.calls.tell("score")
            self._tell(_pack(micro_batches))
        self._inbox = None
        student, work = self._student, work_of(self._link.route, micro_batches)
        if student.is_last_stage:
            ranks = student.tp_size if student.sequence_parallel else 1
            mine = micro_batches[: len(micro_batches.numbers(student.dp_rank))]
            expected = [
                Expected(i, rows_of(batch, ranks), self._link.member(work.sender(student.dp_rank, i, student.tp_rank)))
                for i, batch in enumerate(mine)
            ]
            self._inbox = Inbox(
                self._link.states, expected, self._width, self._dtype, ahead=self._in_flight, device=device(),
                name=self._name,
            )  # fmt: skip

    def collect(self) -> TeacherInputs:
        """Hands over what gives each micro batch's states when the loss asks for them, once and in order."""
        inbox, self._inbox = self._inbox, None
        if inbox is None:
            return TeacherInputs((), self._weight, lambda: {"bytes": 0.0, "waited": 0.0})
        assert self._head is not None
        return TeacherInputs(
            _WithHead(inbox, self._head), self._weight, lambda: {"bytes": float(inbox.nbytes), "waited": inbox.waited}
        )

    def after_step(self) -> None:
        """Does nothing: it does not change."""

    def move_out(self) -> None:
        """Does nothing: its GPUs are its own."""

    def move_back(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Lets the teacher's ranks end. Safe to call twice."""
        if self._link.calls is not None and dist.is_initialized() and dist.get_rank() == 0:
            self._link.calls.close()

    def _tell(self, packed: _Packed) -> None:
        try:
            dist.broadcast_object_list([packed], group_src=0, group=self._link.told, device=torch.device("cpu"))
        except RuntimeError as error:
            raise TeacherError(
                f"teacher {self._name} cannot be reached: {one_line(error)}: see what its ranks have printed"
            ) from None


class _WithHead(Sequence[Any]):
    """(states, head) of each micro batch."""

    def __init__(self, inbox: Inbox, head: torch.Tensor) -> None:
        self._inbox, self._head = inbox, head

    def __len__(self) -> int:
        return len(self._inbox)

    def __getitem__(self, index: Any) -> Any:
        return self._inbox[index], self._head


class TeacherHost:
    """The teacher's side: what one of its ranks does for as long as the run lasts."""

    def __init__(
        self, source: StatesSource, link: TeacherLink, batches: MicroBatchBuilder, in_flight: int, name: str
    ) -> None:
        """`batches`: how the student's first data-parallel rank makes its micro batches."""
        self._source, self._link, self._batches = source, link, batches
        self._in_flight, self._name = in_flight, name

    def serve(self) -> None:
        """Scores what it is told to until it is told of the end."""
        assert self._link.calls is not None
        while True:
            name, _ = self._link.calls.next()
            if name == "close":
                return
            told: list[Any] = [None]
            dist.broadcast_object_list(told, group_src=0, group=self._link.told, device=torch.device("cpu"))
            self._score(_unpack(told[0], self._batches))

    def _score(self, step: StepBatches) -> None:
        outbox = Outbox(self._link.states, self._in_flight * len(self._link.route.student.last_stages))

        def deliver(job: Job, place: tuple[int, int], rows: torch.Tensor) -> None:
            outbox.send(rows, self._link.member(self._link.route.student.last_stage(job.data, *place)), job.index)

        self._source.score(step, deliver)
        outbox.flush()


class OwnRanks:
    """`placement: own`."""

    def check(
        self, number: int, teacher: OwnRanksTeacherConfig, hf_config: PretrainedConfig, config: RunConfig,
        data_parallel: int,
    ) -> None:  # fmt: skip
        """Requires that its own sizes divide it."""
        keys = f"teachers.{number}"
        check_divisible(f"teacher {teacher.path!r}", hf_config, teacher.tensor, teacher.pipeline, teacher.expert, keys)
        if teacher.data % teacher.expert:
            raise ConfigError(
                f"{keys}.expert={teacher.expert} must divide {keys}.data={teacher.data}, whose ranks divide the "
                "experts: change one of them"
            )

    def build(
        self, teacher: OwnRanksTeacherConfig, source: tuple[Path, PretrainedConfig], weight: float,
        surroundings: Surroundings,
    ) -> Teacher:  # fmt: skip
        """Loads the head; the rest is on the teacher's ranks (`build_host`)."""
        assert surroundings.link is not None
        dtype = decided(teacher.dtype)
        return DistantTeacher(
            surroundings.link, surroundings.heads.of(*source, dtype), surroundings.grid, weight,
            width=source[1].hidden_size, dtype=DTYPES[dtype], in_flight=teacher.in_flight, name=repr(teacher.path),
        )  # fmt: skip

    def cost(
        self, teacher: OwnRanksTeacherConfig, hf_config: PretrainedConfig, sizes: RunSizes, stage: int
    ) -> TeacherCost:
        """Estimates what is on the student's ranks: its head, and the states of the micro batches on their way."""
        element = BYTES_PER_ELEMENT[decided(teacher.dtype)]
        last = stage == sizes.pp_size - 1
        states = sizes.response_tokens * hf_config.hidden_size * element
        layer, shard = LayerSizes.of(hf_config), sizes.largest_stage(hf_config, teacher.tensor, teacher.pipeline)
        # Of one layer without gradients: hidden states, attention's and the feed-forward part's.
        row = 6 * layer.hidden + (4 * layer.query + 6 * layer.ffn) / teacher.tensor
        return TeacherCost(
            memory={
                "teachers": 0.0,
                "teacher heads": sizes.head_columns(hf_config) * hf_config.hidden_size * element if last else 0.0,
                "teacher states": states / sizes.sequence_shards if last else 0.0,
            },
            logits_bytes=sizes.head_columns(hf_config) * element,
            flops=sizes.head_flops(hf_config),
            layout=ParallelConfig(**teacher.model_dump(include={"tensor", "pipeline", "data", "expert"})),
            own_ranks=teacher.ranks,
            own_flops=sizes.body_flops(hf_config),
            own_memory={
                "weights": shard.parameters * element
                + sizes.frozen_fp8_bytes(hf_config, shard, teacher.precision, element),
                "activations": row * sizes.tokens * element,
                "states": states * teacher.in_flight,
            },
            states_bytes=states * sizes.micro_batches / sizes.sequence_shards if last else 0.0,
        )


def build_host(number: int, config: RunConfig, models: ResolvedModels, link: TeacherLink) -> TeacherHost:
    """Loads this rank's shard of teacher `number`, on one of its own ranks. Raises WeightsError."""
    teacher = config.teachers[number]
    assert isinstance(teacher, OwnRanksTeacherConfig)
    assert link.grid is not None
    model = load_teacher(teacher, models.teachers[number], models, link.grid, config)
    student = config.parallel
    sharded = student.sequence_parallel
    batches = MicroBatchBuilder(
        0,
        models.data_parallel,
        config.micro_batch_size(models.data_parallel),
        one_length=student.pipeline > 1,
        multiple_of=config.micro_batch_multiple,
        device=torch.device("cpu"),
        tokens=config.pack_tokens,
        sequence_multiple_of=2 * student.context if student.context > 1 else 1,
    )
    multiple_of = teacher.precision.alignment
    source = StatesSource(model, link.grid, link.route, sharded=sharded, multiple_of=multiple_of)
    return TeacherHost(source, link, batches, teacher.in_flight, repr(teacher.path))


def _pack(step: StepBatches) -> _Packed:
    dealt = step.dealt
    place = {i: n for n, i in enumerate(dealt)}
    replicas = range(step.builder.dp_size)
    deal = [
        [(portion.number, [place[i] for i in portion.rollouts]) for portion in step.deal[data] if portion.number >= 0]
        for data in replicas
    ]
    rollouts = [step.rollouts[i] for i in dealt]
    prompts = [torch.tensor(rollout.prompt.token_ids, dtype=torch.int32) for rollout in rollouts]
    answers = [rollout.response_ids.to("cpu", torch.int32) for rollout in rollouts]
    tokens = torch.cat([part for pair in zip(prompts, answers, strict=True) for part in pair])
    return deal, [len(each) for each in prompts], [len(each) for each in answers], tokens


def _unpack(packed: _Packed, batches: MicroBatchBuilder) -> StepBatches:
    deal, prompts, answers, tokens = packed
    sizes = [size for pair in zip(prompts, answers, strict=True) for size in pair]
    parts = iter(tokens.split(sizes))
    rollouts = [
        Rollout(Prompt(str(i), tuple(next(parts).tolist()), ""), next(parts).to(torch.int64), None, 0)
        for i in range(len(prompts))
    ]
    portions = [[Portion(number, tuple(mine)) for number, mine in each] for each in deal]
    return StepBatches(dataclasses.replace(batches, device=torch.device("cpu")), rollouts, portions)
