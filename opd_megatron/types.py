"""What flows between the rooms, in the order in which it is made.

    Prompt -> Rollout -> Batch -> TeacherStates -> StepMetrics

Legend for shapes: B sequences, S padded sequence length, T packed response tokens, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

NamedTensor = tuple[str, torch.Tensor]
"""A Hugging Face parameter name and its value: whole, unless the text says shards."""

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
    task: str = "default"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the student samples. Engine-independent."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    """Seed of the whole call; sequence i of the call samples with `seed + i`."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer sampled by the student."""

    prompt: Prompt
    response_ids: tuple[int, ...]
    """Sampled tokens, the stop token included when one was sampled."""
    logprobs: tuple[float, ...]
    """Log-probability of each sampled token under the policy that drew it, in nats: after temperature, top-p and top-k,
    so with the last two switched off that of softmax(logits / temperature)."""
    policy_version: int
    """How many optimizer steps the weights that sampled it had seen."""
    finish_reason: str = "length"
    """`stop` or `length`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One data-parallel rank's sequences, right-padded to one length.

    Position i of a sequence predicts token i + 1, so `weights[b, i]` is 1 exactly where `tokens[b, i + 1]` is a
    response token; prompt and padding positions are 0.
    """

    tokens: torch.Tensor
    """[B, S] int64."""
    targets: torch.Tensor
    """[B, S] int64: the next token of each position (0 where there is none)."""
    weights: torch.Tensor
    """[B, S] float32: 1 where the target is a response token."""
    rollout_logprobs: torch.Tensor | None = None
    """[B, S] float32: `Rollout.logprobs` of the targets, 0 where `weights` is; None where nothing was sampled."""

    def micro_batches(self, size: int) -> list[Batch]:
        """Splits along B; `size` must divide it."""
        assert len(self.tokens) % size == 0, f"{len(self.tokens)} sequences do not split into micro batches of {size}"
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.tokens), size)]

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda values: values.to(device))

    def rows(self, rows: slice) -> Batch:
        """Some of the sequences."""
        return self._map(lambda values: values[rows])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        logprobs = None if self.rollout_logprobs is None else change(self.rollout_logprobs)
        return Batch(change(self.tokens), change(self.targets), change(self.weights), logprobs)

    @property
    def num_tokens(self) -> int:
        """Response tokens in the batch."""
        return int(self.weights.sum().item())


@dataclass(frozen=True, slots=True)
class TeacherStates:
    """One teacher's final hidden states at the response positions of each micro batch.

    Only ranks of the student's last pipeline stage hold any; elsewhere the list is empty.
    """

    hidden: list[torch.Tensor] = field(default_factory=list)
    """One [T, h] tensor a micro batch, rows in the order of `weights.nonzero()`."""


@dataclass(slots=True)
class StepMetrics:
    """What one step reports; `metrics.jsonl` holds exactly this, one object a line."""

    step: int
    loss: float
    reverse_kl: float
    forward_kl: float
    tokens: int
    policy_version: int
    grad_norm: float
    lr: float
    extra: dict[str, float] = field(default_factory=dict)
    """Further token means of the update (`losses.reduction`), phase times `time/*` in seconds, `memory/peak` in bytes,
    `eval/*`, `rollout/*`."""

    def as_dict(self) -> dict[str, float | int]:
        names = ("step", "loss", "reverse_kl", "forward_kl", "tokens", "policy_version", "grad_norm", "lr")
        return {name: getattr(self, name) for name in names} | self.extra
