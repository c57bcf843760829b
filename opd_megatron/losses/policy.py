"""Sampled-token terms: a policy-gradient loss per response token, from what the divergence's own pass yields.

With p the student's and q the teacher's probability of the sampled token a, p_roll that of the
rollout engine which sampled it, and p_old the trainer's before the update,

    loss = -w min(rho A, clip(rho, 1 - low, 1 + high) A),     rho = p / p_old,     w = min(p_old / p_roll, cap)

(PPO, arXiv 1707.06347; the capped weight w corrects for a rollout engine that samples with other arithmetic than the
trainer's). A and w are constants. Beside it, or alone, the negative log-likelihood -log p(a) of tokens that were not
sampled. Only d loss / d log p(a) is needed here: the pass over the vocabulary turns it into the gradient of all logits,
delta_a - p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from opd_megatron.errors import ConfigError
from opd_megatron.losses.divergences import DIVERGENCES

ADVANTAGES = ("given", "kl", "jsd", "lambda_jsd")
LEVELS = ("token", "sequence")


@dataclass(frozen=True, slots=True)
class PolicyTerm:
    """Adds `coef` times a policy-gradient loss to the objective. Tensors are [T], one value for each token."""

    rollout_logprobs: torch.Tensor | None = None
    """Of the sampled tokens under the rollout engine, at the objective's temperature. None: no policy gradient."""
    coef: float = 1.0
    """lambda_rl. Of all of the term."""
    likelihood: torch.Tensor | None = None
    """Weight of -log p(a), by token."""
    advantage: str = "given"
    """Where A comes from: `given` (`advantages` alone), or a distillation advantage that is added to them.

    `kl`: kl_coef (log q(a) - log p_roll(a)). `jsd`: -dJSD_beta/dp(a) = (1 - beta)(log m(a) - log p(a)), m = beta q +
    (1 - beta) p. `lambda_jsd`: the same of lambda KL(p|m) + (1 - lambda) KL(q|m), m = (p + q) / 2. We subtract the
    value at p = q, so that the advantage is 0 where the models agree. A constant does not change the expected gradient:
    it is minus kl_coef times that of the divergence, exactly.
    """
    advantages: torch.Tensor | None = None
    """Advantages from rewards."""
    kl_coef: float = 1.0
    """Multiplies the distillation advantage, whichever it is."""
    beta: float = 0.5
    lambda_coef: float = 0.5
    old_logprobs: torch.Tensor | None = None
    """log p_old. By default p_roll, so that w = 1. With an `importance_cap`, p itself: rho = 1 and w = min(p / p_roll,
    cap), the correction for a step that makes one update of its samples."""
    clip: tuple[float, float] | None = None
    """(low, high) of the clipped ratio; none by default."""
    importance_cap: float | None = None
    """The cap."""
    window: tuple[float, float] | None = None
    """(low, high): w is the ratio itself where it lies in there, and 0 elsewhere (MOPD, arXiv 2601.02780), in the place
    of a cap."""
    prefix_gamma: float | None = None
    """Multiplies A by 1 + gamma (1 - d_t / d), d_t the sum of |log q - log p_roll| over the sequence's tokens before
    this one, d over all of them: IW-OPD (arXiv 2606.22600). Needs `sequence_ids`."""
    level: str = "token"
    """`sequence`: rho and w are geometric means over a sequence's tokens (GSPO-token, arXiv 2507.18071)."""
    sequence_ids: torch.Tensor | None = None
    """int64, non-decreasing: which sequence a token belongs to. For `level="sequence"` and `prefix_gamma`, which need
    whole sequences on one rank, or what of them the next two say."""
    sequence_counts: tuple[int, ...] | None = None
    """Tokens of each sequence, in order, where they are known without asking the device for them."""
    sequence_gaps: torch.Tensor | None = None
    """Mean over each token's sequence of log p - log p_roll, where ranks have parts of sequences (context
    parallelism). Not with `old_logprobs`."""
    prefix_shares: torch.Tensor | None = None
    """d_t / d of `prefix_gamma`, likewise."""

    @property
    def of_sequences(self) -> bool:
        """Whether a token's loss depends on the others of its sequence, and so on them being here."""
        alone = self.sequence_gaps is not None or self.prefix_shares is not None
        return not alone and (self.level == "sequence" or self.prefix_gamma is not None)

    def rows(self, rows: slice) -> PolicyTerm:
        """Selects some of the tokens."""
        values = {name: getattr(self, name) for name in _PER_TOKEN}
        chosen: dict[str, Any] = {name: value[rows] for name, value in values.items() if value is not None}
        return replace(self, **chosen, sequence_counts=None)


_PER_TOKEN = (
    "rollout_logprobs", "likelihood", "advantages", "old_logprobs", "sequence_ids", "sequence_gaps", "prefix_shares",
)  # fmt: skip


class PolicyResult(NamedTuple):
    """Each [T], detached."""

    loss: torch.Tensor
    dloss_dlogp: torch.Tensor
    """d loss / d log p(a)."""
    advantage: torch.Tensor
    ratio: torch.Tensor
    """p / p_roll of the token, or of its sequence."""
    clipped: torch.Tensor
    """1 where the clip, or the window, took the gradient away, else 0."""
    likelihood: torch.Tensor
    """`PolicyTerm.likelihood` times -log p(a)."""


def check_policy(term: PolicyTerm, like: torch.Tensor, *, values: bool = True) -> None:
    """Raises ConfigError for what does not fit; `like` has one row for each token. `values`: look at numbers too, for
    which a device is waited for."""
    for name in _PER_TOKEN:
        value = getattr(term, name)
        if value is None:
            continue
        if value.shape != like.shape[:1] or value.device != like.device:
            raise ConfigError(
                f"policy.{name} has shape {list(value.shape)} on {value.device} but must be [{len(like)}] on "
                f"{like.device}: one value for each token"
            )
    _check_choices(term)
    if term.rollout_logprobs is None and term.likelihood is None:
        raise ConfigError(
            "policy has neither rollout_logprobs nor a likelihood, and so no loss: pass one of them, or leave it out"
        )
    if term.of_sequences and term.rollout_logprobs is not None:
        ids = term.sequence_ids
        if ids is None or ids.dtype != torch.int64 or (values and bool((ids[1:] < ids[:-1]).any())):
            raise ConfigError(
                "policy.sequence_ids must be int64 and non-decreasing for level='sequence' and prefix_gamma: number "
                "each token's sequence, whole sequences one after another"
            )


def _check_choices(term: PolicyTerm) -> None:
    if term.advantage not in ADVANTAGES:
        raise ConfigError(f"policy.advantage={term.advantage!r} is not one: use one of {', '.join(ADVANTAGES)}")
    if term.advantage == "given" and term.advantages is None and term.rollout_logprobs is not None:
        raise ConfigError(
            "policy.advantages is missing but advantage='given' uses nothing else: pass one for each token"
        )
    if term.level not in LEVELS:
        raise ConfigError(f"policy.level={term.level!r} is not one: use one of {', '.join(LEVELS)}")
    if not (math.isfinite(term.coef) and math.isfinite(term.kl_coef)):
        raise ConfigError(f"policy.coef={term.coef} and kl_coef={term.kl_coef} must be finite: use 0 for no such term")
    for name in ("beta", "lambda_coef"):
        if not 0 <= getattr(term, name) <= 1:
            raise ConfigError(f"policy.{name}={getattr(term, name)} must lie in [0, 1]: 0.5 is the symmetric form")
    if term.clip is not None and not (0 <= term.clip[0] <= 1 and 0 <= term.clip[1] < math.inf):
        raise ConfigError(f"policy.clip={term.clip} must be (low in [0, 1], high >= 0): PPO uses (0.2, 0.2)")
    if term.importance_cap is not None and not term.importance_cap > 0:
        raise ConfigError(
            f"policy.importance_cap={term.importance_cap} must be positive: 2 is usual, None switches it off"
        )
    if term.window is not None and not (0 <= term.window[0] < term.window[1] < math.inf):
        raise ConfigError(f"policy.window={term.window} must be 0 <= low < high: MOPD uses (0.2, 5)")
    if term.window is not None and (term.importance_cap is not None or term.clip is not None):
        raise ConfigError(f"policy.window={term.window} has no effect beside importance_cap or clip: keep one of them")


def policy_loss(
    term: PolicyTerm, logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, mask: torch.Tensor | None
) -> PolicyResult:
    """Computes the loss of each token and its derivative.

    Args:
        term: of these T tokens.
        logprobs: [T] log p(a).
        teacher_logprobs: [T] log q(a).
        mask: [T] bool, which tokens count in a sequence's mean; all by default.
    """
    if term.rollout_logprobs is None:
        none = torch.zeros_like(logprobs)
        return _with_likelihood(term, PolicyResult(none, none, none, none + 1, none, none), logprobs)
    rollout = term.rollout_logprobs.to(logprobs.dtype)
    advantage = _advantage(term, logprobs, teacher_logprobs, rollout)
    if term.prefix_gamma is not None:
        advantage = advantage * _prefix_weight(term, teacher_logprobs - rollout, mask)
    of_engine = _ratio(term, logprobs - rollout, mask)
    ratio, weight = _ratios(term, logprobs, rollout, mask, of_engine)
    surrogate = ratio * advantage
    clipped = torch.zeros_like(surrogate, dtype=torch.bool)
    if term.clip is not None:
        low, high = term.clip
        bounded = ratio.clamp(1 - low, 1 + high) * advantage
        clipped = bounded < surrogate
        surrogate = torch.where(clipped, bounded, surrogate)
    loss = -weight * surrogate
    # d rho / d log p = rho; a clipped ratio is a constant.
    dloss_dlogp = torch.where(clipped, 0, loss)
    left_out = clipped if term.window is None else weight == 0
    found = PolicyResult(
        loss, dloss_dlogp, advantage, of_engine, left_out.to(loss.dtype), torch.zeros_like(loss)
    )  # fmt: skip
    return _with_likelihood(term, found, logprobs)


def _with_likelihood(term: PolicyTerm, found: PolicyResult, logprobs: torch.Tensor) -> PolicyResult:
    if term.likelihood is None:
        return found
    weight = term.likelihood.to(logprobs.dtype)
    # Selection: 0 times the infinity of a token that cannot be sampled is not 0.
    nll = torch.where(weight == 0, 0, -weight * logprobs)
    return found._replace(loss=found.loss + nll, dloss_dlogp=found.dloss_dlogp - weight, likelihood=nll)


def _ratios(
    term: PolicyTerm, logprobs: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor | None, of_engine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes rho and w. `of_engine`: p / p_roll."""
    if term.old_logprobs is not None:
        old = term.old_logprobs.to(logprobs.dtype)
        ratio, weight = _ratio(term, logprobs - old, mask), _ratio(term, old - rollout, mask)
    else:
        one = torch.ones_like(of_engine)
        ratio, weight = (of_engine, one) if term.importance_cap is None and term.window is None else (one, of_engine)
    if term.importance_cap is not None:
        weight = weight.clamp(max=term.importance_cap)
    if term.window is not None:
        low, high = term.window
        weight = torch.where((weight >= low) & (weight <= high), weight, 0)
    return ratio, weight


def _prefix_weight(term: PolicyTerm, gap: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Computes 1 + gamma (1 - d_t / d) of every token."""
    assert term.prefix_gamma is not None
    if not len(gap):
        return gap
    share = term.prefix_shares
    if share is None:
        assert term.sequence_ids is not None
        share = prefix_shares(gap if mask is None else torch.where(mask, gap, 0), term.sequence_ids)
    return (1 + term.prefix_gamma * (1 - share)).to(gap.dtype)


def prefix_shares(gap: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    """Computes d_t / d of every token (`PolicyTerm.prefix_gamma`) from log q - log p_roll: [T] float64."""
    distance, index = gap.abs().double(), _numbered(sequence_ids)
    whole = torch.zeros_like(distance).index_add_(0, index, distance)
    before_sequence = (whole.cumsum(0) - whole)[index]
    before = distance.cumsum(0) - distance - before_sequence
    return before / whole[index].clamp(min=1e-8)


def sequence_means(values: torch.Tensor, counts: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    """Computes the mean over each token's sequence, [T], of the tokens whose count is 1."""
    index = _numbered(sequence_ids)
    total = torch.zeros_like(values).index_add_(0, index, values)
    number = torch.zeros_like(values).index_add_(0, index, counts.to(values.dtype))
    return (total / number.clamp(min=1))[index]


def _numbered(sequence_ids: torch.Tensor) -> torch.Tensor:
    """Numbers the sequences from 0 in their order; there are at most as many as tokens."""
    return F.pad((sequence_ids[1:] != sequence_ids[:-1]).long().cumsum(0), (1, 0))[: len(sequence_ids)]


def _advantage(
    term: PolicyTerm, logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, rollout: torch.Tensor
) -> torch.Tensor:
    given = torch.zeros_like(logprobs) if term.advantages is None else term.advantages.to(logprobs.dtype)
    if term.advantage == "given":
        return given
    if term.advantage == "kl":
        return given + term.kl_coef * (teacher_logprobs - rollout)
    of_jsd = {"jsd": ("gkd", term.beta), "lambda_jsd": ("lambda_jsd", term.lambda_coef)}
    name, parameter = of_jsd[term.advantage]
    divergence = DIVERGENCES[name].make(parameter)
    return given - term.kl_coef * divergence.df_dp(logprobs - teacher_logprobs)


def _ratio(term: PolicyTerm, log_ratio: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Computes exp of the log ratio, or of its mean over each sequence."""
    if term.level == "token" or not len(log_ratio):
        return log_ratio.exp()
    if term.sequence_gaps is not None:
        return term.sequence_gaps.to(log_ratio.dtype).exp()
    assert term.sequence_ids is not None
    counts = torch.ones_like(log_ratio) if mask is None else mask
    # Selection: a masked token's log ratio may be anything.
    values = log_ratio if mask is None else torch.where(mask, log_ratio, 0)
    return sequence_means(values, counts, term.sequence_ids).exp()
