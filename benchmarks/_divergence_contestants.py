"""The ways to the same number that `divergence.py` compares: ours, bare matrix products, dense autograd, Liger, TRL.

All take the same inputs and yield the mean divergence of a token in nats. Dividing by the tokens gives backward a
factor that is not one, as training has it: whoever has made the gradients in forward must still scale them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import BenchmarkError

from opd_megatron.losses import linear_divergence, vocab_parallel_divergence
from opd_megatron.losses.divergences import DIVERGENCES, Divergence
from opd_megatron.losses.kernels import use_backend

# Values at which each named argument of a divergence is measured.
PARAMETERS = {"beta": (0.5, 0.1), "alpha": (0.1,), "lambda_coef": (0.9,)}

# A sharp distribution, as language models have; flat ones hide what exponentials cost and how well they are computed.
_LOGIT_DEVIATION = 3.0
_SHARED = 0.8  # correlation of teacher and student logits: about two nats between them


@dataclass(frozen=True, slots=True)
class Loss:
    """One divergence at one parameter."""

    type: str
    argument: str | None = None
    value: float = 0.0

    @property
    def name(self) -> str:
        return self.type if self.argument is None else f"{self.type} {self.value:g}"

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `linear_divergence` and `vocab_parallel_divergence`."""
        return {"type": self.type} | ({} if self.argument is None else {self.argument: self.value})

    @property
    def divergence(self) -> Divergence:
        return DIVERGENCES[self.type].make(self.value)


def all_losses() -> list[Loss]:
    """Every divergence that the package has, so that a new one is measured without a change here."""
    losses = []
    for name, family in DIVERGENCES.items():
        if family.argument is None:
            losses.append(Loss(name))
        else:
            losses += [Loss(name, family.argument, value) for value in PARAMETERS[family.argument]]
    return losses


@dataclass(frozen=True, slots=True)
class Case:
    """One problem size on one device."""

    tokens: int
    hidden: int
    columns: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def name(self) -> str:
        place = "gpu " if self.device == "cuda" else ""
        return f"{place}{self.tokens}x{self.hidden}x{self.columns} {self._precision}"

    @property
    def logits_name(self) -> str:
        place = "gpu " if self.device == "cuda" else ""
        return f"{place}{self.tokens}x{self.columns} {self._precision}"

    @property
    def logits_bytes(self) -> int:
        """Of fp32 student logits, the unit of memory."""
        return 4 * self.tokens * self.columns

    @property
    def _precision(self) -> str:
        return {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Hidden states [T, h] and heads [v, h]; the student's are differentiable."""

    student_hidden: torch.Tensor
    student_head: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor

    @classmethod
    def of(cls, case: Case) -> Inputs:
        generator = torch.Generator(case.device).manual_seed(0)

        def draw(rows: int, deviation: float) -> torch.Tensor:
            shape = (rows, case.hidden)
            return torch.randn(shape, generator=generator, device=case.device).mul_(deviation)

        hidden = draw(case.tokens, 1.0)
        head = draw(case.columns, _LOGIT_DEVIATION / math.sqrt(case.hidden))
        other = draw(case.columns, _LOGIT_DEVIATION / math.sqrt(case.hidden) * math.sqrt(1 - _SHARED**2))
        teacher = other.add_(head, alpha=_SHARED).to(case.dtype)
        hidden, head = hidden.to(case.dtype), head.to(case.dtype)
        # The teacher has hidden states of its own in memory, though equal ones, as two models would.
        return cls(hidden.requires_grad_(), head.requires_grad_(), hidden.detach().clone(), teacher)

    @torch.no_grad()
    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Student's (differentiable) and teacher's, [T, v]."""
        student = self.student_hidden @ self.student_head.t()
        return student.requires_grad_(), self.teacher_hidden @ self.teacher_head.t()


@dataclass(frozen=True, slots=True)
class Contestant:
    """A differentiable way to the mean divergence."""

    forward: Callable[[], torch.Tensor]
    leaves: tuple[torch.Tensor, ...]

    def backward(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The gradient of each leaf."""
        return torch.autograd.grad(loss, self.leaves)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """Forward and backward: (loss, gradient of each leaf)."""
        loss = self.forward()
        return loss.detach(), *self.backward(loss)


def ours(inputs: Inputs, loss: Loss, *, chunk_tokens: int | None = None, backend: str = "auto") -> Contestant:
    x = inputs
    teachers = [(x.teacher_hidden, x.teacher_head)]
    tokens = len(x.student_hidden)
    # The mean by token weights, which the pass multiplies in; a factor in backward is one more pass over d head.
    weights = torch.full((tokens,), 1 / tokens, device=x.student_hidden.device)

    def forward() -> torch.Tensor:
        with use_backend(backend):
            mean, _ = linear_divergence(
                x.student_hidden, x.student_head, teachers, chunk_tokens=chunk_tokens, token_weights=weights,
                **loss.arguments,
            )  # fmt: skip
        return mean

    return Contestant(forward, (x.student_hidden, x.student_head))


def ours_from_logits(student: torch.Tensor, teacher: torch.Tensor, loss: Loss) -> Contestant:
    return Contestant(lambda: vocab_parallel_divergence(student, teacher, **loss.arguments).mean(), (student,))


def bare_products(inputs: Inputs) -> Callable[[], None]:
    """The products that no exact method can do without, whole, into memory that is already there."""
    hidden, head = inputs.student_hidden.detach(), inputs.student_head.detach()
    logits, of_teacher = (hidden.new_empty(len(hidden), len(head)) for _ in range(2))
    hidden_gradient, head_gradient = torch.empty_like(hidden), torch.empty_like(head)

    def run() -> None:
        torch.mm(hidden, head.t(), out=logits)
        torch.mm(inputs.teacher_hidden, inputs.teacher_head.t(), out=of_teacher)
        # The logits stand in for their gradient, which has the same shape and dtype.
        torch.mm(logits, head, out=hidden_gradient)
        torch.mm(logits.t(), hidden, out=head_gradient)

    return run


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """KL(a|b) averaged over tokens."""
    return F.kl_div(log_b, log_a, log_target=True, reduction="batchmean")


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


# As users write them. Any divergence of ours is compared with the fastest of them.
DENSE: dict[Loss, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    Loss("forward_kl"): lambda log_p, log_q: _kl(log_q, log_p),
    Loss("reverse_kl"): _kl,
    Loss("gkd", "beta", 0.5): _jsd,
}


def _dense_loss(loss: Loss, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    log_p = F.log_softmax(student, dim=-1, dtype=torch.float32)
    with torch.no_grad():
        log_q = F.log_softmax(teacher, dim=-1, dtype=torch.float32)
    return DENSE[loss](log_p, log_q)


def dense(inputs: Inputs, loss: Loss) -> Contestant:
    """Products in the inputs' dtype, softmax and divergence in fp32, all left to autograd."""
    x = inputs

    def forward() -> torch.Tensor:
        with torch.no_grad():
            teacher = x.teacher_hidden @ x.teacher_head.t()
        return _dense_loss(loss, x.student_hidden @ x.student_head.t(), teacher)

    return Contestant(forward, (x.student_hidden, x.student_head))


def dense_from_logits(student: torch.Tensor, teacher: torch.Tensor, loss: Loss) -> Contestant:
    return Contestant(lambda: _dense_loss(loss, student, teacher), (student,))


LIGER_LOSS = Loss("gkd", "beta", 0.5)


def liger(inputs: Inputs) -> Contestant:
    """LigerFusedLinearJSDLoss with its own chunk size, the soft loss alone; compiled, its default, on a GPU only.

    It computes beta KL(q|m) + (1 - beta) KL(p|m), m = (1 - beta) p + beta q, over the number of targets that are not
    its ignore_index: `LIGER_LOSS` averaged over tokens. Its softmax is in the inputs' dtype.
    """
    try:
        module = importlib.import_module("liger_kernel.chunked_loss")
    except ImportError as error:
        raise BenchmarkError(f"liger-kernel cannot be imported ({error}): run `make env`, which installs it") from error
    x = inputs
    compiled = x.student_hidden.is_cuda
    loss = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled)
    labels = torch.zeros(len(x.student_hidden), dtype=torch.int64, device=x.student_hidden.device)

    def forward() -> torch.Tensor:
        result: torch.Tensor = loss(x.student_hidden, x.student_head, x.teacher_hidden, x.teacher_head, labels)
        return result

    return Contestant(forward, (x.student_hidden, x.student_head))


TRL_BETAS = {Loss("forward_kl"): 0.0, Loss("reverse_kl"): 1.0, Loss("gkd", "beta", 0.5): 0.5}


def trl(inputs: Inputs, loss: Loss) -> Contestant:
    """The chunked divergence of TRL's DistillationTrainer: products in fp32, heads multiplied out again in backward."""
    try:
        module = importlib.import_module("trl.kernels.chunked_divergence")
    except ImportError as error:
        raise BenchmarkError(f"trl cannot be imported ({error}): run `make env`, which installs it") from error
    x, beta = inputs, TRL_BETAS[loss]

    def forward() -> torch.Tensor:
        per_token, _ = module.ChunkedDivergenceFunction.apply(
            x.student_hidden, x.student_head, None, x.teacher_hidden, x.teacher_head, None, beta
        )
        mean: torch.Tensor = per_token.mean()
        return mean

    return Contestant(forward, (x.student_hidden, x.student_head))


def difference(one: Contestant, other: Contestant) -> float:
    """Largest relative difference, in the Frobenius norm, over loss and gradients."""
    return max(relative_difference(a, b) for a, b in zip(one(), other(), strict=True))


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (torch.dist(a.float(), b.float()) / b.float().norm()).item()
