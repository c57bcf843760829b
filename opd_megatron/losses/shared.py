"""A teacher of another vocabulary.

`rows` say where both models have read the same text and are about to give its next token. There the two distributions
are compared over what both know: every token that both vocabularies have is an event, and all other tokens together are
one more,

    L = sum_k f(p_k, q_k) + f(p_rest, q_rest),    k over the tokens that both have.

It is what is left of the divergence when tokens are merged, so never more than it, and the gradient of the rest's
logits keeps their proportions. Where one of the vocabularies has no other token, the distributions are compared given
that the token is one of both (`conditional`): a divergence from what the other cannot say would be infinite. A token
where the two do not meet has no divergence: it counts with 0.

For the sampled tokens, `spans` are stretches of text that both tokenizations cut out alike. The teacher's
log-probability of a span is spread over the student's tokens in it so that each has the same difference,

    log q_i = log p_i + (log q(span) - log p(span)) / n,    n of the student's tokens,

whose sum over the span is log q(span) whatever the spread. A token without a span has the difference 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opd_megatron.errors import ConfigError


@dataclass(frozen=True, eq=False, slots=True)
class TranslatedHead:
    """The LM head of such a teacher, cut over the student's tensor-parallel ranks."""

    weight: torch.Tensor
    """[n + m, h] rows of the LM head: of this rank's `columns`, in their order, and a share of all others. Each row of
    the model's head is on one rank."""
    columns: torch.Tensor
    """[n] int64, rising: columns of this rank of the student, from 0, whose token the teacher has too."""
    places: torch.Tensor
    """[the teacher's vocabulary] int64: row of each token in `weight`; -1 where it is another rank's."""
    conditional: bool = False
    """Whether one of the vocabularies has no token that the other lacks."""


@dataclass(frozen=True, eq=False, slots=True)
class SharedTeacher:
    """Hidden states and head of such a teacher for T tokens of the student, which are T' of its own.

    With sequence parallelism `hidden` is this rank's rows and `gather_index` [T'] says where each token's row is among
    those of all ranks, as in `linear_divergence_terms`; all the rest is whole on every rank but for head and columns.
    """

    hidden: torch.Tensor
    """[T', h]"""
    head: torch.Tensor
    """[n + m, h] as in `TranslatedHead`."""
    columns: torch.Tensor
    """[n]"""
    rows: torch.Tensor
    """[T] int64: which of the T' rows reads the same text as the student's token does; -1 for none."""
    spans: torch.Tensor
    """[T] int64, not negative or -1 for none."""
    spans_of_rows: torch.Tensor
    """[T'] int64."""
    targets: torch.Tensor
    """[T'] int64: row of this rank's `head` of the teacher's own token; -1 where it is another rank's."""
    gather_index: torch.Tensor | None = None
    conditional: bool = False
    """Leave the event of all other tokens out."""

    def of_rows(self, hidden: torch.Tensor) -> SharedTeacher:
        """With all T' rows, gathered."""
        return replace(self, hidden=hidden, gather_index=None)

    def spread(self, logprobs: torch.Tensor, of_rows: torch.Tensor) -> torch.Tensor:
        """[T] the teacher's log-probabilities, spread over the student's tokens.

        Args:
            logprobs: [T] of the student's tokens, under whom the difference is to.
            of_rows: [T'] of the teacher's tokens.
        """
        spans = int(max(self.spans.max(), self.spans_of_rows.max())) + 1 if len(self.spans) else 0
        mine, other = self.spans >= 0, self.spans_of_rows >= 0
        difference = of_rows.new_zeros(spans).index_add_(0, self.spans_of_rows[other], of_rows[other])
        difference.index_add_(0, self.spans[mine], logprobs[mine].to(of_rows.dtype), alpha=-1)
        count = of_rows.new_zeros(spans).index_add_(0, self.spans[mine], torch.ones_like(logprobs[mine]).to(of_rows))
        each = difference / count.clamp(min=1)
        spread = logprobs.to(of_rows.dtype).clone()
        spread[mine] += each[self.spans[mine]]
        return spread


@dataclass(frozen=True, eq=False, slots=True)
class SharedRows:
    """Of a block of tokens, as `SharedLoss` reads it."""

    met: torch.Tensor
    """[T] bool: the two have read the same text."""
    columns: torch.Tensor
    """As above."""
    logprobs: torch.Tensor | None
    """[T] the teacher's of the sampled tokens, spread by the rollouts' own, where a policy term wants them."""

    def rows(self, rows: slice) -> SharedRows:
        return SharedRows(self.met[rows], self.columns, None if self.logprobs is None else self.logprobs[rows])


def split_shared(teachers: Any) -> tuple[Any, SharedTeacher | None]:
    """Returns (nothing, the teacher of another vocabulary) where `teachers` is one or a list of one; (`teachers`, None)
    where they are others.

    Raises:
        ConfigError: it is one of several.
    """
    if isinstance(teachers, SharedTeacher):
        return (), teachers
    if not isinstance(teachers, Sequence) or not any(isinstance(teacher, SharedTeacher) for teacher in teachers):
        return teachers, None
    if len(teachers) > 1:
        raise ConfigError(
            f"teachers holds one of another vocabulary among {len(teachers)} but an ensemble mixes distributions over "
            "one: pass it alone"
        )
    return (), teachers[0]


def check_shared(teacher: SharedTeacher, like: torch.Tensor, columns: int) -> None:
    """Raises ConfigError for what does not fit; `like` has one row for each token. `columns`: of the student's true
    vocabulary, on this rank."""
    tokens = len(like)
    for name, wanted in (("rows", tokens), ("spans", tokens), ("spans_of_rows", len(teacher.targets))):
        value = getattr(teacher, name)
        if value.dtype != torch.int64 or value.shape != (wanted,) or value.device != like.device:
            raise ConfigError(
                f"teacher's {name} is {list(value.shape)} {value.dtype} on {value.device} but must be [{wanted}] int64 "
                f"on {like.device}: pass one for each token"
            )
    rows = len(teacher.targets)
    if teacher.gather_index is None and len(teacher.hidden) != rows:
        raise ConfigError(f"teacher's hidden has {len(teacher.hidden)} rows for {rows} targets: pass the same tokens")
    if len(teacher.columns) > len(teacher.head):
        raise ConfigError(
            f"teacher's head has {len(teacher.head)} rows for {len(teacher.columns)} columns: pass a row of each first"
        )
    if tokens and rows and int(teacher.rows.max()) >= rows:
        raise ConfigError(f"teacher's rows reach {int(teacher.rows.max())} of {rows}: pass rows of its hidden states")
    if len(teacher.columns) and not (int(teacher.columns.min()) >= 0 and int(teacher.columns.max()) < columns):
        raise ConfigError(
            f"teacher's columns range over [{int(teacher.columns.min())}, {int(teacher.columns.max())}] but the "
            f"student has {columns} on this rank: pass columns of the true vocabulary, counted from the rank's first"
        )
