"""The sampled-token loss as its formula says, dense in float64, differentiated by autograd."""

from __future__ import annotations

import torch

from opd_megatron.losses.policy import PolicyTerm


def _per_sequence(values: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Mean over the kept tokens of each token's sequence."""
    return torch.stack([values[(ids == i) & kept].mean() for i in ids])


def dense_policy_loss(
    log_p: torch.Tensor, log_q: torch.Tensor, targets: torch.Tensor, term: PolicyTerm, kept: torch.Tensor
) -> torch.Tensor:
    """[T] from log-probabilities [T, V] (log_p with a gradient)."""
    logp = log_p.gather(1, targets[:, None])[:, 0]
    logq = log_q.gather(1, targets[:, None])[:, 0]
    now = logp.detach()
    rollout = term.rollout_logprobs.double()
    if term.old_logprobs is not None:
        old = term.old_logprobs.double()
    else:
        old = now if term.importance_cap is not None else rollout
    advantage = torch.zeros_like(now) if term.advantages is None else term.advantages.double()
    if term.advantage == "kl":
        advantage = advantage + term.kl_coef * (logq - rollout)
    elif term.advantage == "jsd":
        log_m = (term.beta * logq.exp() + (1 - term.beta) * now.exp()).log()
        advantage = advantage + term.kl_coef * (1 - term.beta) * (log_m - now)
    elif term.advantage == "lambda_jsd":
        p, q = now.exp().requires_grad_(), logq.exp()
        m = (p + q) / 2
        share = term.lambda_coef
        jsd = share * p * (p.log() - m.log()) + (1 - share) * q * (q.log() - m.log())
        (df_dp,) = torch.autograd.grad(jsd.sum(), p)
        where_they_agree = (2 * share - 1) / 2  # a constant: advantages are 0 there
        advantage = advantage - term.kl_coef * (df_dp - where_they_agree)
    log_ratio, log_weight = now - old, old - rollout
    if term.level == "sequence":
        log_ratio = _per_sequence(log_ratio, term.sequence_ids, kept)
        log_weight = _per_sequence(log_weight, term.sequence_ids, kept)
    # The value of the ratio with the gradient of the token's own probability.
    ratio = log_ratio.exp() * (logp - now).exp()
    weight = log_weight.exp()
    if term.importance_cap is not None:
        weight = weight.clamp(max=term.importance_cap)
    surrogate = ratio * advantage
    if term.clip is not None:
        surrogate = torch.minimum(surrogate, ratio.clamp(1 - term.clip[0], 1 + term.clip[1]) * advantage)
    return -weight * surrogate
