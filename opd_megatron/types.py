"""What flows between the rooms, in the order in which it is made.

    Prompt -> SampleRequest -> Rollout -> Batch -> TeacherInputs -> StepOutput -> StepMetrics

Legend for shapes: B sequences, S padded sequence length, T packed response tokens, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

NamedTensor = tuple[str, torch.Tensor]
"""A Hugging Face parameter name and its value: whole, unless the text says shards."""

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Names of number formats in configurations and on command lines."""

Bucket = Sequence[NamedTensor]
"""A bounded group of named tensors: the unit in which weights leave the trainer."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenized with the chat template and ready to be continued."""

    id: str
    """Stable name of the row, e.g. `gsm_symbolic:17`."""
    token_ids: tuple[int, ...]
    text: str
    """What a person would read; only for logs."""
    answer: str | None = None
    """The gold answer, where the task has one."""
    answer_ids: tuple[int, ...] | None = None
    """The gold answer as response tokens (end-of-turn included); held-out evaluation scores them."""
    task: str | None = None
    """Which task it belongs to, where the data say so."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the row that its task wants."""
    contexts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """What teachers with a `prompt` of their own read in this one's place: their number -> its tokens."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the student samples. Engine-independent."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One answer to sample."""

    prompt: Prompt
    seed: int | None = None
    """Of this sequence alone, so that its answer depends neither on the engine nor on the other requests."""
    group: int = 0
    """Answers of one group answer the same prompt: its index in the step."""


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One answer sampled by the student."""

    prompt: Prompt
    response_ids: torch.Tensor
    """[n] int64: sampled tokens, the stop token included when one was sampled."""
    logprobs: torch.Tensor | None
    """[n] float32: log-probability in nats of each sampled token under the policy that drew it, after temperature,
    top-p and top-k. With the last two switched off it is that of softmax(logits / temperature). None for a gold
    answer."""
    policy_version: int
    """How many optimizer steps the weights that sampled it had seen."""
    finish_reason: str = "length"
    """`stop` or `length`."""
    group: int = 0
    """The request's."""
    advantage: float | None = None
    """From rewards, where a stage between sampling and batching has given one."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One data-parallel rank's sequences: right-padded to one length, or one after another in a single row.

    Position i of a sequence predicts token i + 1, so `weights[b, i]` is 1 exactly where `tokens[b, i + 1]` is a
    response token; prompt and padding positions are 0. Where a token stands and which sequence it belongs to is said by
    the batch alone: nothing else derives it from rows and columns.
    """

    tokens: torch.Tensor
    """[B, S] int64."""
    targets: torch.Tensor
    """[B, S] int64: the next token of each position (0 where there is none)."""
    weights: torch.Tensor
    """[B, S] float32: above 0 exactly where the target is a response token; 1 there unless `objective.balance` says
    otherwise."""
    rollout_logprobs: torch.Tensor | None = None
    """[B, S] float32: `Rollout.logprobs` of the targets, 0 where `weights` is; None where nothing was sampled."""
    advantages: torch.Tensor | None = None
    """[B, S] float32: `Rollout.advantage` at every target, 0 where `weights` is; None where nothing was scored."""
    given: torch.Tensor | None = None
    """[B, S] float32: 1 where the target is of an answer that was not sampled; None where none was sampled."""
    position_ids: torch.Tensor = field(default=None)  # type: ignore[assignment]  # derived below
    """[B, S] int64: each token's position in its sequence; 0, 1, .. along every row by default."""
    sequence_ids: torch.Tensor = field(default=None)  # type: ignore[assignment]
    """[B, S] int64, non-decreasing in reading order: which sequence a position belongs to; the row by default."""
    routes: torch.Tensor | None = None
    """[B, S] int64: which teachers a position's sequence is for (`teacher.routing`); None where all teachers score all
    of them."""
    present: tuple[int, ...] = ()
    """The routes in it, rising, so that nobody has to ask the device."""
    lengths: tuple[int, ...] | None = None
    """Tokens of the sequences in the row of a packed batch, which attend to themselves alone; they sum to S, or to S
    times the context-parallel size where the row is one rank's part of them. None where every row is one sequence."""

    copy_on_host: Batch | None = None
    """The same on the CPU, where it has gone to a device: what decides how much is computed is asked of it, as asking
    the device would wait for all that it has yet to do."""

    def __post_init__(self) -> None:
        rows, length = self.tokens.shape
        if self.position_ids is None:
            positions = torch.arange(length, device=self.tokens.device)
            object.__setattr__(self, "position_ids", positions.expand_as(self.tokens))
        if self.sequence_ids is None:
            sequences = torch.arange(rows, device=self.tokens.device)
            object.__setattr__(self, "sequence_ids", sequences.unsqueeze(1).expand_as(self.tokens))

    def micro_batches(self, size: int) -> list[Batch]:
        """Splits along B; `size` must divide it."""
        assert len(self.tokens) % size == 0, f"{len(self.tokens)} sequences do not split into micro batches of {size}"
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.tokens), size)]

    def to(self, device: torch.device) -> Batch:
        """Copies every tensor to the device."""
        if device.type == "cpu":
            return self
        return replace(self._map(lambda values: values.to(device)), copy_on_host=self)

    @property
    def has_parts(self) -> bool:
        """Whether it holds a context-parallel rank's part of every sequence."""
        return self.lengths is not None and sum(self.lengths) > self.tokens.shape[1]

    @property
    def on_host(self) -> Batch:
        """The same on the CPU."""
        return self.copy_on_host or self

    @property
    def response_mask(self) -> torch.Tensor:
        """[B, S] bool, on the CPU: where the target is a response token."""
        return self.on_host.weights > 0

    def rows(self, rows: slice) -> Batch:
        """Selects some of the sequences."""
        assert self.lengths is None, "a packed batch has one row"
        return self._map(lambda values: values[rows])

    def columns(self, columns: torch.Tensor) -> Batch:
        """Selects some of the positions of a packed row; `lengths` stay those of the whole."""
        assert self.lengths is not None, "rows that are sequences have all of their positions"
        return self._map(lambda values: values[:, columns.to(values.device)])

    def with_rows(self, rows: int) -> Batch:
        """Grows to so many sequences by copies of the first one in which no token counts."""
        present = len(self.tokens)
        if rows == present:
            return self
        grown = self._map(lambda values: torch.cat([values, values[:1].expand(rows - present, -1)]))
        grown.weights[present:] = 0
        grown.sequence_ids[present:] = torch.arange(present, rows, device=self.tokens.device).unsqueeze(1)
        return grown

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {}
        for column in fields(self):
            value = getattr(self, column.name)
            changed[column.name] = change(value) if isinstance(value, torch.Tensor) else value
        return Batch(**changed | {"copy_on_host": None})

    @property
    def num_tokens(self) -> int:
        """Response tokens in the batch."""
        return int(self.response_mask.sum())


def places_of(mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Indices of a mask on the CPU within it, flattened, in order: [T] int64 on the device, which is not waited for."""
    return mask.flatten().nonzero().squeeze(1).to(device, non_blocking=True)


def at_places(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Values [B, S] at `places_of` some positions: [T]. Also at a mask [B, S]."""
    return values[places] if places.dtype == torch.bool else values.flatten().index_select(0, places)


@dataclass(frozen=True, slots=True)
class TeacherInputs:
    """What the loss takes of one teacher for the micro batches that it was given."""

    outputs: Sequence[Any] = ()
    """One `losses.TeacherOutput` a micro batch ((hidden states, head), or top-k entries), which only the loss opens.
    Each is asked for once, in order. Empty except on the student's last pipeline stage."""
    weight: float = 1.0
    """Share in an ensemble; all shares sum to one."""
    meter: Callable[[], dict[str, float]] | None = None
    """What it has taken so far, on this rank: `bytes` that came from other ranks, seconds `waited` for them. None, on
    every rank, for a teacher whose states are where they are wanted."""
    view: TeacherView | None = None
    """What it was shown; None where that was the student's micro batches as they are."""
    tokens: int = 0
    """Response tokens that it scored, of all ranks."""
    seconds: float = 0.0
    """That the student stood still for it before the update."""
    reference: bool = False
    """Whether it is what `objective.reference_kl` is a distance from, and no teacher."""


@dataclass(frozen=True, slots=True, eq=False)
class AlignedTokens:
    """The response tokens of a micro batch in two tokenizations, T of the student's and T' of the teacher's, in the
    order of the batches."""

    rows: torch.Tensor
    """[T] int64: row of the teacher's T' that predicts what follows the same text; -1 for none."""
    spans: torch.Tensor
    """[T] int64, numbered through the micro batch; -1 for none."""
    spans_of_rows: torch.Tensor
    """[T'] int64."""
    targets: torch.Tensor
    """[T'] int64: the teacher's tokens."""

    def of_tokens(self, kept: torch.Tensor) -> AlignedTokens:
        """Selects some of the student's tokens, whole answers of them; the teacher's stay."""
        return AlignedTokens(self.rows[kept], self.spans[kept], self.spans_of_rows, self.targets)


@dataclass(frozen=True, slots=True)
class TeacherView:
    """What a teacher saw of a step: some of the sequences, or other prompts before them."""

    batches: Sequence[Batch]
    """This rank's, padded as the student's are; one for each of the outputs, in the same order."""
    places: Mapping[int, int]
    """Number of a micro batch of the student's -> index in `batches`. Absent where it saw nothing of it."""
    routes: frozenset[int] | None
    """Values of `Batch.routes` that it scores; None for all."""
    aligned: Sequence[AlignedTokens] | None = None
    """Of each of `batches`, where they are in tokens of another tokenizer."""
    aligned_share: float | None = None
    """Of the student's tokens of all ranks, those that it has something to say about; None with the same tokenizer."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one optimizer step yields, the same on every rank. Means are over all response tokens of the step."""

    metrics: dict[str, float]
    tokens: int
    grad_norm: float
    lr: float


@dataclass(slots=True)
class StepMetrics:
    """What one step reports; `metrics.jsonl` holds exactly this, one object a line."""

    step: int
    loss: float
    reverse_kl: float | None
    """None without a teacher."""
    forward_kl: float | None
    tokens: int
    policy_version: int
    grad_norm: float
    lr: float
    extra: dict[str, float] = field(default_factory=dict)
    """Further token means of the update (`losses.reduction`), phase times `time/*` in seconds, `memory/peak` in bytes,
    `eval/*`, `rollout/*`."""

    def as_dict(self) -> dict[str, float | int]:
        names = ("step", "loss", "reverse_kl", "forward_kl", "tokens", "policy_version", "grad_norm", "lr")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None} | self.extra
