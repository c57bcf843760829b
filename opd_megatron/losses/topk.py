"""A teacher that is served elsewhere and sends only its k best log-probabilities of each token.

We know how much probability is outside the top k, but not on which tokens. Renormalising the k entries, or leaving the
rest out, makes another objective: reverse KL then falls by draining the student's mass from the entries. Here the rest
of the vocabulary is one more event, the tail:

    L = sum_k f(p_j, q_j) + f(p_tail, q_tail),    p_tail = sum of p over all columns that have no entry.

It equals the divergence from the teacher whose tail is shaped like the student's, q_j = p_j q_tail / p_tail (f is
homogeneous, see `divergences`), and no teacher with these entries is nearer: what the tail hides can only add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opd_megatron.errors import ConfigError
from opd_megatron.losses.core.validation import LossSpec
from opd_megatron.losses.kernels.base import LOG_ZERO

PADDING = -1
# How far a row's mass may be from what it must be, besides the rounding of its own numbers.
_MASS_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class TopKTeacher:
    """A teacher's k entries of each token, the same on every rank of the group.

    They must be at the objective's temperature, log softmax(logits / T), because a tail of unknown shape cannot be
    brought to another one. With sequence parallelism they are those of all T tokens.

    The tail's mass is 1 - sum exp(logprobs), or what the numbers can resolve of it where that is more: 1.2e-7 plus half
    a unit in the last place of every entry (so about 2e-3 for bf16 entries, 2e-7 for fp32). Send `tail_logprob` with
    entries of few digits. A row that covers the whole vocabulary has no tail. A row of padding alone (a token that the
    server has nothing about) is all tail: its divergence and gradient are 0.
    """

    ids: torch.Tensor
    """[T, k] int64 global token ids, each once in its row; -1 pads a row of fewer entries."""
    logprobs: torch.Tensor
    """[T, k] floating, nats; -inf where the id is -1."""
    tail_logprob: torch.Tensor | None = None
    """[T], log of the mass outside the entries. -inf (an underflow) counts as not given."""

    def of_tokens(self, tokens: torch.Tensor) -> TopKTeacher:
        """Selects tokens by their indices, int64."""
        tail = None if self.tail_logprob is None else self.tail_logprob[tokens]
        return TopKTeacher(self.ids[tokens], self.logprobs[tokens], tail)


@dataclass(frozen=True, eq=False, slots=True)
class TopKEntries:
    """A checked `TopKTeacher`, as `TopKLoss` reads it."""

    ids: torch.Tensor
    """[T, k]"""
    logprobs: torch.Tensor
    """[T, k] in the objective's dtype, at least LOG_ZERO."""
    log_tail: torch.Tensor
    """[T]"""
    covered: torch.Tensor
    """[T] bool: the entries are the whole vocabulary, there is no tail."""

    def rows(self, rows: slice) -> TopKEntries:
        return TopKEntries(self.ids[rows], self.logprobs[rows], self.log_tail[rows], self.covered[rows])


def split_topk(teachers: Any) -> tuple[Any, TopKTeacher | None]:
    """Returns (nothing, the top-k teacher) where `teachers` is one or a list of one; (`teachers`, None) where they are
    others.

    Raises:
        ConfigError: it is one of several.
    """
    if isinstance(teachers, TopKTeacher):
        return (), teachers
    if not isinstance(teachers, Sequence) or not any(isinstance(teacher, TopKTeacher) for teacher in teachers):
        return teachers, None
    if len(teachers) > 1:
        raise ConfigError(
            f"teachers holds a TopKTeacher among {len(teachers)} but an ensemble mixes whole distributions: pass it "
            "alone, or give every teacher as logits or (hidden, head)"
        )
    return (), teachers[0]


def check_entries(teacher: TopKTeacher, like: torch.Tensor, spec: LossSpec) -> TopKEntries:
    """Raises ConfigError for what does not fit; `like` has one row for each token."""
    _check_tensors(teacher, like)
    covered = (teacher.ids != PADDING).sum(-1) == spec.vocab_size
    logprobs = teacher.logprobs.detach().double()
    probabilities = logprobs.exp()
    mass = probabilities.sum(-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    # A server's softmax is fp32 at best, whatever type its numbers come in.
    resolution = torch.finfo(torch.float32).eps + _half_ulp(teacher.logprobs) * entropy
    total, tolerance = mass, _MASS_TOLERANCE + resolution
    log_tail = torch.maximum(1 - mass, resolution).log()
    if teacher.tail_logprob is not None:
        given = teacher.tail_logprob.detach().double()
        total = mass + given.exp()
        tolerance = tolerance + _half_ulp(teacher.tail_logprob) * torch.special.entr(given.exp())
        log_tail = torch.where(given == -torch.inf, log_tail, given)
    whole = covered if teacher.tail_logprob is None else torch.ones_like(covered)
    # The negation refuses a NaN too.
    off = ~((total - 1 <= tolerance) & ((1 - total <= tolerance) | ~whole))
    _check_content(teacher, spec.vocab_size, total, off)
    lowest = logprobs.to(spec.dtype).clamp_(min=LOG_ZERO)
    return TopKEntries(teacher.ids, lowest, log_tail.to(spec.dtype), covered)


def _half_ulp(values: torch.Tensor) -> float:
    return torch.finfo(values.dtype).eps / 2


def _check_tensors(teacher: TopKTeacher, like: torch.Tensor) -> None:
    fields = {"ids": teacher.ids, "logprobs": teacher.logprobs, "tail_logprob": teacher.tail_logprob}
    for name, value in fields.items():
        if value is None and name == "tail_logprob":
            continue
        if not isinstance(value, torch.Tensor) or value.dim() != (1 if name == "tail_logprob" else 2):
            got = list(value.shape) if isinstance(value, torch.Tensor) else f"a {value.__class__.__name__}"
            wanted = "[T]" if name == "tail_logprob" else "[T, k]"
            raise ConfigError(
                f"top-k teacher's {name} is {got} but must be a tensor {wanted}: pad short rows with id -1"
            )
        if value.device != like.device:
            raise ConfigError(
                f"top-k teacher's {name} is on {value.device} but the student is on {like.device}: move it there"
            )
        if len(value) != len(like):
            raise ConfigError(
                f"top-k teacher's {name} has {len(value)} rows but the student has {len(like)} tokens: pass the same "
                "tokens"
            )
        if name == "ids" and value.dtype != torch.int64:
            raise ConfigError(f"top-k teacher's ids has dtype {value.dtype} but must be int64: convert it with .long()")
        if name != "ids" and not value.is_floating_point():
            raise ConfigError(f"top-k teacher's {name} has dtype {value.dtype} but must be floating: use float32")
    if teacher.ids.shape != teacher.logprobs.shape or teacher.ids.shape[1] == 0:
        raise ConfigError(
            f"top-k teacher's ids {list(teacher.ids.shape)} and logprobs {list(teacher.logprobs.shape)} must have one "
            "shape [T, k], k >= 1: pass one log-probability for each id"
        )


def _check_content(teacher: TopKTeacher, vocab_size: int, total: torch.Tensor, off: torch.Tensor) -> None:
    """Checks ids, padding and mass; `off` marks the rows whose `total` mass is wrong."""
    ids = teacher.ids
    ordered = ids.sort(-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING)
    padded = (ids == PADDING) & (teacher.logprobs != -torch.inf)
    outside = (ids < PADDING) | (ids >= vocab_size)
    failures = torch.stack([outside.any(-1), repeated.any(-1), padded.any(-1), off])
    if not bool(failures.any()):  # the only wait for a device
        return
    kind, row = failures.nonzero()[0].tolist()
    where = f"top-k teacher's row {row}"
    mass = float(total[row])
    raise ConfigError(
        (
            f"{where} has ids outside [0, {vocab_size}): pass ids of the true vocabulary, or -1 with log-probability "
            "-inf for a short row",
            f"{where} holds an id twice: leave one out (servers may append the sampled token to its best k)",
            f"{where} has a log-probability for id -1: padding must have -inf",
            f"{where} has a mass of {mass:.6g} but probabilities sum to 1, or to less if a tail is left over: pass "
            "log-probabilities in nats at the objective's temperature, not logits",
        )[kind]
    )
