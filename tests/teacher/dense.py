"""One step of a run written out densely with transformers in float64: each answer against its own teachers, which may
read another prompt, each token with its own weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opd_megatron.config import RunConfig
from opd_megatron.models import ResolvedModels
from opd_megatron.types import Rollout


def one_step(config: RunConfig, models: ResolvedModels) -> tuple[dict[str, Any], list[Rollout], Any]:
    """Makes the first step of a run; returns its metrics, its answers and the tokenizer."""
    from opd_megatron.trainer import OPDTrainer

    taken: list[Rollout] = []

    def keep(rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        taken.extend(rollouts)
        return rollouts

    with OPDTrainer.from_config(config, models) as trainer:
        trainer.stages = (keep,)
        trainer.rollout_client.start(0)
        return trainer.step().as_dict(), taken, trainer.tokenizer


Teachers = Callable[[Rollout], list[tuple[str, float, tuple[int, ...] | None]]]
"""Of an answer: (folder, share, what it reads in the prompt's place) of each teacher."""


@dataclass(frozen=True)
class DenseStep:
    loss: float
    grad_norm: float


def dense_step(
    student: str, rollouts: Sequence[Rollout], teachers: Teachers, vocab: int, scales: Sequence[float] | None = None
) -> DenseStep:
    """Reverse KL of `student` from the logit mean of each answer's teachers, over the number of all tokens."""
    model = _model(student)
    frozen: dict[str, Any] = {}
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for i, rollout in enumerate(rollouts):
        log_p = _logits(model, rollout.prompt.token_ids, rollout, vocab).log_softmax(-1)
        mixed = torch.zeros_like(log_p)
        answers = teachers(rollout)
        for folder, share, context in answers:
            teacher = frozen.setdefault(folder, _model(folder))
            with torch.no_grad():
                mixed += share * _logits(teacher, context or rollout.prompt.token_ids, rollout, vocab)
        log_q = (mixed / sum(share for _, share, _ in answers)).log_softmax(-1)
        scale = 1.0 if scales is None else scales[i]
        total = total + scale * (log_p.exp() * (log_p - log_q)).sum()
        tokens += len(rollout.response_ids)
    loss = total / tokens
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    return DenseStep(float(loss), float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))


def _model(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def _logits(model: Any, context: Sequence[int], rollout: Rollout, vocab: int) -> torch.Tensor:
    ids = torch.tensor([[*context, *rollout.response_ids.tolist()]])
    logits: torch.Tensor = model(ids).logits[0, len(context) - 1 : -1, :vocab]
    return logits
