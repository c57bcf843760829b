"""Top-k teachers for tests, and their divergence as one would write it: k entries and one more event, in float64."""

from __future__ import annotations

import os

import pytest
import torch

from opd_megatron.losses import TopKTeacher, vocab_parallel_divergence
from tests.losses.reference import EVENT_KINDS, EVENT_NAMES, FORMULAE

T, H, V = 9, 12, 40
every_kind = pytest.mark.parametrize(("type", "arguments"), EVENT_KINDS, ids=EVENT_NAMES)
# By hand, as Triton decides when it is imported whether it interprets: TRITON_INTERPRET=1 pytest -k triton tests/losses
BACKENDS = ["torch", "compiled", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def pair(scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(T, V, generator=generator) for _ in range(2))
    return student, teacher


def value_and_gradient(student, teacher, **arguments):
    student = student.clone().requires_grad_()
    loss = vocab_parallel_divergence(student, teacher, **arguments)
    loss.sum().backward()
    return loss.detach(), student.grad


def best_of(logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopKTeacher:
    """What a server of these logits [T, V] would send."""
    logprobs, ids = (logits.double() / temperature).log_softmax(-1).topk(k)
    return TopKTeacher(ids, logprobs.float())


def padded(teacher: TopKTeacher, lengths: list[int]) -> TopKTeacher:
    """Rows cut to these numbers of entries."""
    short = torch.arange(teacher.ids.shape[1]) >= torch.tensor(lengths).unsqueeze(-1)
    ids, logprobs = teacher.ids.masked_fill(short, -1), teacher.logprobs.masked_fill(short, -torch.inf)
    return TopKTeacher(ids, logprobs, teacher.tail_logprob)


def events(log_p: torch.Tensor, teacher: TopKTeacher, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of one row's events, from the student's [V], under both models: entries, then any tail."""
    kept = teacher.ids[row] >= 0
    ids, log_q = teacher.ids[row][kept], teacher.logprobs[row][kept].double()
    tail = torch.ones(len(log_p), dtype=torch.bool).index_fill(0, ids, False)
    if not tail.any():
        return log_p[ids], log_q
    if teacher.tail_logprob is None:
        resolution = 2**-23 + torch.finfo(teacher.logprobs.dtype).eps / 2 * torch.special.entr(log_q.exp()).sum()
        log_q_tail = (1 - log_q.exp().sum()).maximum(resolution).log()
    else:
        log_q_tail = teacher.tail_logprob[row].double()
    return torch.cat([log_p[ids], log_p[tail].logsumexp(-1, True)]), torch.cat([log_q, log_q_tail.reshape(1)])


def bucketed_divergence(
    student: torch.Tensor, teacher: TopKTeacher, type: str, temperature: float = 1.0, **arguments: float
) -> torch.Tensor:
    """[T] from unpadded logits [T, V]."""
    log_p = (student.double() / temperature).log_softmax(-1)
    rows = [events(log_p[row], teacher, row) for row in range(len(log_p))]
    return torch.stack([FORMULAE[type](p, q, **arguments) for p, q in rows])


def completed(student: torch.Tensor, teacher: TopKTeacher, temperature: float = 1.0) -> torch.Tensor:
    """Logits [T, V] of the teacher with these entries whose tail is shaped like the student's."""
    log_p = (student.double() / temperature).log_softmax(-1)
    log_q = torch.empty_like(log_p)
    for row in range(len(log_p)):
        softmax_coef, of_q = events(log_p[row], teacher, row)
        log_q[row] = log_p[row] + (of_q[-1] - softmax_coef[-1])
        kept = teacher.ids[row] >= 0
        log_q[row, teacher.ids[row][kept]] = teacher.logprobs[row][kept].double()
    return log_q * temperature
