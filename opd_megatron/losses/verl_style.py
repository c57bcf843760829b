"""The losses under the names and with the arguments that verl's policy losses have, for code that is written for them.

Values are those of `vocab_parallel_divergence`: exact, with `group` also from vocabulary-sharded logits. Shapes: B
answers, S response tokens, v vocabulary entries (of this rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from opd_megatron.errors import ConfigError
from opd_megatron.losses.vocab_parallel import vocab_parallel_divergence

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
Logits = torch.Tensor | Sequence[torch.Tensor]
PolicyLoss = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Loss, share of clipped tokens, mean of log_prob's fall since the rollout, share clipped from below."""
_KEYS = (
    "policy_loss", "distillation_type", "distillation_beta", "distillation_temperature", "combine", "teacher_weights",
    "hybrid_lambda_rl", "hybrid_lambda_distill", "clip_ratio", "clip_ratio_low", "clip_ratio_high",
)  # fmt: skip


def compute_reverse_kl_loss(
    student_logits: torch.Tensor, teacher_logits: Logits, temperature: float = 1.0, **loss: Any
) -> torch.Tensor:
    """KL(student|teacher) at every token, [B, S], from logits [B, S, v]. `loss`: `group`, `vocab_size`, `combine` and
    `teacher_weights` of `vocab_parallel_divergence`."""
    return _per_token(student_logits, teacher_logits, type="reverse_kl", temperature=temperature, **loss)


def compute_forward_kl_loss(
    student_logits: torch.Tensor, teacher_logits: Logits, temperature: float = 1.0, **loss: Any
) -> torch.Tensor:
    """KL(teacher|student) at every token; as `compute_reverse_kl_loss`."""
    return _per_token(student_logits, teacher_logits, type="forward_kl", temperature=temperature, **loss)


def compute_generalized_jsd_loss(
    student_logits: torch.Tensor, teacher_logits: Logits, beta: float = 0.5, temperature: float = 1.0, **loss: Any
) -> torch.Tensor:
    """GKD's divergence at every token: beta 0 is forward KL, 1 reverse KL; as `compute_reverse_kl_loss`."""
    return _per_token(student_logits, teacher_logits, type="gkd", beta=beta, temperature=temperature, **loss)


def compute_on_policy_distillation_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor | None,
    response_mask: torch.Tensor,
    loss_agg_mode: Aggregation = "token-mean",
    config: Mapping[str, Any] | None = None,
    rollout_log_probs: torch.Tensor | None = None,
    teacher_logits: Logits | None = None,
    student_logits: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> PolicyLoss:
    """The divergence from the teachers on the student's own answers.

    Args:
        old_log_prob, log_prob: [B, S] of the sampled tokens, when they were sampled and now; reported, not trained on.
        advantages, rollout_log_probs: not used; they are verl's.
        response_mask: [B, S], 1 at tokens that count.
        loss_agg_mode: mean over all tokens, or over answers of their tokens' sum or mean.
        config: `distillation_type` (reverse_kl, forward_kl, gkd), `distillation_beta` (of gkd),
            `distillation_temperature`; `combine` and `teacher_weights` for several teachers.
        teacher_logits: [B, S, v], or one of each teacher of an ensemble.
        student_logits: [B, S, v]; differentiable.
        group: tensor-parallel group over which the vocabulary is sharded.

    Raises:
        ConfigError: (a ValueError) logits are missing, or a setting is unknown or out of range.
    """
    settings = _settings(config)
    loss = _aggregated(
        _distillation(settings, student_logits, teacher_logits, response_mask, group), response_mask, loss_agg_mode
    )
    nothing = loss.detach().new_zeros(())
    return loss, nothing, _fall(old_log_prob, log_prob, response_mask), nothing


def compute_hybrid_rl_distillation_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: Aggregation = "token-mean",
    config: Mapping[str, Any] | None = None,
    rollout_log_probs: torch.Tensor | None = None,
    teacher_logits: Logits | None = None,
    student_logits: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> PolicyLoss:
    """hybrid_lambda_rl x PPO's clipped policy gradient on `advantages` [B, S] + hybrid_lambda_distill x the divergence;
    as `compute_on_policy_distillation_loss`. `log_prob` is differentiable. `clip_ratio` is 0.2, `clip_ratio_low` and
    `clip_ratio_high` are its two sides (PPO: arXiv 1707.06347)."""
    settings = _settings(config)
    clip = settings.get("clip_ratio", 0.2)
    low, high = settings.get("clip_ratio_low", clip), settings.get("clip_ratio_high", clip)
    ratio = (log_prob - old_log_prob).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    policy = _aggregated(torch.maximum(free, clipped), response_mask, loss_agg_mode)
    distil = _aggregated(
        _distillation(settings, student_logits, teacher_logits, response_mask, group), response_mask, loss_agg_mode
    )
    total = settings.get("hybrid_lambda_rl", 1.0) * policy + settings.get("hybrid_lambda_distill", 1.0) * distil
    share = _aggregated((clipped > free).to(total.dtype), response_mask, "token-mean").detach()
    return total, share, _fall(old_log_prob, log_prob, response_mask), share.new_zeros(())


def _settings(config: Mapping[str, Any] | None) -> dict[str, Any]:
    settings = dict(config or {})
    unknown = [name for name in settings if name not in _KEYS]
    if unknown:
        raise ConfigError(f"config has {unknown[0]!r}, which has no effect: use {', '.join(_KEYS)}")
    return settings


def _distillation(
    settings: Mapping[str, Any],
    student: torch.Tensor | None,
    teacher: Logits | None,
    mask: torch.Tensor,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """At the tokens of the mask, [B, S]; 0 elsewhere, whatever stands there."""
    if student is None or teacher is None:
        missing = "student_logits" if student is None else "teacher_logits"
        raise ConfigError(f"{missing} is missing: pass the logits [B, S, v] of both models at the response tokens")
    name = settings.get("distillation_type", "reverse_kl")
    own = {"beta": settings.get("distillation_beta", 0.5)} if name == "gkd" else {}
    others = {key: settings[key] for key in ("combine", "teacher_weights") if key in settings}
    temperature = settings.get("distillation_temperature", 1.0)
    teachers, kept = _same_tokens(student, teacher), mask > 0
    rows = [logits[kept] for logits in teachers]
    values = _per_token(student[kept], rows, type=name, temperature=temperature, group=group, **own, **others)
    return values.new_zeros(mask.shape).masked_scatter(kept, values)


def _per_token(student: torch.Tensor, teacher: Logits, **loss: Any) -> torch.Tensor:
    flat = [logits.flatten(0, -2) for logits in _same_tokens(student, teacher)]
    return vocab_parallel_divergence(student.flatten(0, -2), flat, **loss).view(student.shape[:-1])


def _same_tokens(student: torch.Tensor, teacher: Logits) -> list[torch.Tensor]:
    teachers = [teacher] if isinstance(teacher, torch.Tensor) else list(teacher)
    for logits in teachers:
        if logits.shape[:-1] != student.shape[:-1]:
            raise ConfigError(
                f"teacher_logits is {list(logits.shape)} and student_logits {list(student.shape)}: give the logits of "
                "the same tokens"
            )
    return teachers


def _aggregated(per_token: torch.Tensor, mask: torch.Tensor, mode: Aggregation) -> torch.Tensor:
    counted = torch.where(mask > 0, per_token, 0)  # a masked infinity is not a NaN
    if mode == "token-mean":
        return counted.sum() / mask.sum().clamp(min=1)
    if mode == "seq-mean-token-sum":
        return counted.sum(-1).mean()
    if mode == "seq-mean-token-mean":
        return (counted.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    raise ConfigError(f"loss_agg_mode={mode!r} is not one: use token-mean, seq-mean-token-sum or seq-mean-token-mean")


def _fall(old_log_prob: torch.Tensor, log_prob: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _aggregated((old_log_prob - log_prob).detach(), mask, "token-mean")
