"""What `objective.type` can be, one entry each: its formula, its terms, its own keys and its metrics.

The configuration makes its keys from this table, the student its loss, and the table of docs/objectives.md is checked
against it. A new divergence is one line here beside its entry in `divergences.DIVERGENCES`. Nothing here imports torch.

An objective is a list of terms that are added up, all computed in one pass over the vocabulary: an exact divergence,
policy gradients on the sampled tokens, or both. Rewards are a term of their own beside any `type`.
"""

# ruff: noqa: RUF001  formulae are written with the letters of the papers

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from opd_megatron.errors import ConfigError
from opd_megatron.losses.divergences import BETA, DIVERGENCES, LAMBDA_COEF, PARAMETERS, Parameter

if TYPE_CHECKING:
    import torch

    from opd_megatron.types import Batch

DIVERGENCE_METRICS = (
    "loss", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement",
    "nll", "teacher_nll", "k1", "k2", "k3", "k1_gap",
)  # fmt: skip
"""Token means of every objective. `nll` and `teacher_nll` are of the targets; `k1` to `k3` estimate `reverse_kl` from
them where the student sampled them, and `k1_gap` says by how much `k1` misses it."""
POLICY_METRICS = ("divergence", "policy_loss", "advantage", "ratio", "clip_fraction")
"""What a policy gradient adds: the exact divergence of the objective's `type`, and its own loss without its weight."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of `objective:` that only some types use."""

    name: str
    annotation: Any
    """Type and range, as pydantic reads them."""
    default: Any
    meaning: str


@dataclass(frozen=True, slots=True)
class Term:
    """One addend of the loss."""

    divergence: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `linear_divergence_terms`: the divergence and its weight `lambda_distill`. Empty: none."""
    policy: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `PolicyTerm`, without its tensors. Empty: none."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return DIVERGENCE_METRICS + (POLICY_METRICS if self.policy else ())


@dataclass(frozen=True, slots=True)
class Objective:
    """A leaf: what one `objective.type` minimises."""

    formula: str
    """At every response token, with p the student and q the teacher: the column `loss` of docs/objectives.md."""
    term: Callable[[Any], Term]
    """From the values of the section `objective:`."""
    keys: tuple[str, ...] = ()
    """Names in `KEYS`. Any other key of that table is an error beside this type."""
    replaced: Mapping[str, str] = field(default_factory=dict)
    """Key -> the key beside which it has no effect, where that one is set."""
    paper: str = ""
    """A Markdown link."""

    def used_keys(self, values: Any) -> tuple[str, ...]:
        """The keys that have an effect with these values."""
        return tuple(key for key in self.keys if getattr(values, self.replaced.get(key, ""), None) is None)


def _of_parameter(parameter: Parameter) -> Key:
    upper: dict[str, Any] = {"le": 1} if parameter.not_one is None else {"lt": 1}
    return Key(parameter.name, Annotated[float, Field(ge=0, **upper)], parameter.default, parameter.meaning)


_Weight = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]

KEYS: dict[str, Key] = {name: _of_parameter(parameter) for name, parameter in PARAMETERS.items()} | {
    key.name: key
    for key in (
        Key(
            LAMBDA_COEF.name, _Share | None, None,
            "Weight of KL(student|m), the rest is KL(teacher|m), m their mean. null: 0.5, and for jsd the divergence "
            "of `beta` in its place",
        ),
        Key(
            "kl_coef", _Weight, 1.0,
            "Multiplies the advantage, e.g. log q(a) - log p_rollout(a) of on_policy_distill",
        ),
        Key(
            "truncation", Annotated[float, Field(gt=0)] | None, 2.0,
            "Cap on the importance weight p / p_rollout, which corrects for a rollout engine with other arithmetic "
            "than the trainer's; 2 is usual. null: no cap, and `clip_low` with `clip_high` may bound the ratio",
        ),
        Key(
            "clip_low", _Share | None, None,
            "The ratio p / p_rollout is clipped below 1 - clip_low as in PPO; null does not clip",
        ),
        Key(
            "clip_high", _Weight | None, None,
            "The same above 1 + clip_high; goes together with `clip_low`, and with truncation=null",
        ),
        Key(
            "ratio_level", Literal["token", "sequence"], "token",
            "A ratio for each token, or its geometric mean over the sequence (GSPO)",
        ),
    )
}  # fmt: skip
_RATIO_KEYS = ("truncation", "clip_low", "clip_high", "ratio_level")


def _exact(name: str, formula: str, paper: str = "") -> Objective:
    """Makes the leaf of a divergence over the whole vocabulary, with its own parameter as key."""
    own = DIVERGENCES[name].argument

    def term(values: Any) -> Term:
        given = None if own is None else getattr(values, own)
        parameter = {} if own is None or given is None else {own: given}
        return Term(divergence={"type": name, "lambda_distill": values.lambda_distill, **parameter})

    return Objective(formula, term, () if own is None else (own,), paper=paper)


def _policy(values: Any, weight: float, **advantage: Any) -> dict[str, Any]:
    """Fields of a `PolicyTerm` with the importance ratios of `_RATIO_KEYS`."""
    clip = None if values.clip_low is None or values.clip_high is None else (values.clip_low, values.clip_high)
    ratios = {"clip": clip, "importance_cap": values.truncation, "level": values.ratio_level}
    return {"coef": weight, **advantage, **ratios}


def _on_policy_distill(values: Any) -> Term:
    # A sampled form reports its divergence exactly, with no weight in the loss.
    exact = {"type": "reverse_kl", "lambda_distill": 0.0}
    return Term(exact, _policy(values, values.lambda_distill, advantage="kl", kl_coef=values.kl_coef))


def _jsd(values: Any) -> Term:
    kind, own = ("jsd", BETA) if values.lambda_coef is None else ("lambda_jsd", LAMBDA_COEF)
    parameter = {own.name: getattr(values, own.name)}
    exact = {"type": "gkd" if values.lambda_coef is None else "lambda_jsd", "lambda_distill": 0.0, **parameter}
    return Term(exact, _policy(values, values.lambda_distill, advantage=kind, kl_coef=values.kl_coef, **parameter))


def _rewards(values: Any) -> Term:
    return Term(policy=_policy(values, values.lambda_rl, advantage="given"))


OBJECTIVES: dict[str, Objective] = {
    "reverse_kl": _exact("reverse_kl", "KL(p‖q)", "[MiniLLM](https://arxiv.org/abs/2306.08543)"),
    "forward_kl": _exact("forward_kl", "KL(q‖p)", "[Hinton et al.](https://arxiv.org/abs/1503.02531)"),
    "gkd": _exact(
        "gkd", "β KL(q‖m) + (1 − β) KL(p‖m), m = β q + (1 − β) p; β = 0 is forward, β = 1 reverse KL",
        "[GKD](https://arxiv.org/abs/2306.13649)",
    ),
    "skew_reverse_kl": _exact(
        "skew_reverse_kl", "KL(p‖m), m = α p + (1 − α) q; α = 0 is reverse KL", "[DistiLLM](https://arxiv.org/abs/2402.03898)"
    ),
    "skew_forward_kl": _exact(
        "skew_forward_kl", "KL(q‖m), m = α q + (1 − α) p; α = 0 is forward KL", "[DistiLLM](https://arxiv.org/abs/2402.03898)"
    ),
    "lambda_jsd": _exact("lambda_jsd", "λ KL(p‖m) + (1 − λ) KL(q‖m), m = (p + q) / 2"),
    "on_policy_distill": Objective(
        "policy gradient, advantage `kl_coef` (log q(a) − log p_rollout(a)) of the sampled token a",
        _on_policy_distill, ("kl_coef", *_RATIO_KEYS),
        paper="[On-Policy Distillation](https://thinkingmachines.ai/blog/on-policy-distillation/)",
    ),
    "jsd": Objective(
        "policy gradient, advantage minus the derivative of `gkd`'s divergence at p(a), or of `lambda_jsd`'s where "
        "`lambda_coef` is set",
        _jsd, (BETA.name, LAMBDA_COEF.name, "kl_coef", *_RATIO_KEYS), {BETA.name: LAMBDA_COEF.name},
    ),
}  # fmt: skip

REWARDS = Objective(
    "policy gradient on the rewards' advantages, beside any type: `lambda_rl` above 0",
    _rewards, _RATIO_KEYS, paper="[PPO](https://arxiv.org/abs/1707.06347)",
)  # fmt: skip


def leaves(values: Any) -> list[Objective]:
    """Lists the leaves that a section `objective:` selects."""
    return [OBJECTIVES[values.type], *([REWARDS] if values.lambda_rl > 0 else [])]


def objective_terms(values: Any) -> list[Term]:
    """Lists the terms whose sum is minimised."""
    return [leaf.term(values) for leaf in leaves(values)]


def users_of(key: str) -> list[str]:
    """Lists the types that use a key of `KEYS`."""
    return [name for name, leaf in OBJECTIVES.items() if key in leaf.keys]


def metric_names(terms: Iterable[Term]) -> tuple[str, ...]:
    """Names the token means that a step reports, in order."""
    return tuple(dict.fromkeys(name for term in terms for name in term.metrics))


def loss_arguments(terms: Sequence[Term], batch: Batch, mask: torch.Tensor) -> dict[str, Any]:
    """Merges the terms into the arguments of one call of `linear_divergence_terms`, on the tokens of `mask` [B, S].

    Raises:
        ConfigError: two terms with a divergence each (one pass computes one), or none.
    """
    divergences = [dict(term.divergence) for term in terms if term.divergence]
    if len(divergences) != 1:
        raise ConfigError(f"an objective needs one divergence, got {len(divergences)}: leave the others out")
    return divergences[0] | {"policy": _policy_term([term.policy for term in terms if term.policy], batch, mask)}


def _policy_term(policies: list[Mapping[str, Any]], batch: Batch, mask: torch.Tensor) -> Any:
    from opd_megatron.losses.policy import PolicyTerm

    if not policies:
        return None
    assert batch.rollout_logprobs is not None, "a policy gradient needs the rollouts' log-probabilities"
    fields, rewards = _merged(policies)
    advantages = None
    if rewards is not None:
        assert batch.advantages is not None, "a term of rewards needs advantages"
        advantages = rewards * batch.advantages[mask]
    return PolicyTerm(
        rollout_logprobs=batch.rollout_logprobs[mask],
        advantages=advantages,
        sequence_ids=batch.sequence_ids[mask] if fields["level"] == "sequence" else None,
        **fields,
    )


def _merged(policies: list[Mapping[str, Any]]) -> tuple[dict[str, Any], float | None]:
    """Fields of one PolicyTerm, and what the rewards' advantages are multiplied by, None without rewards.

    The surrogate is linear in the advantage, so a sum of policy gradients is one of the weighted sum of advantages.
    """
    given = [policy for policy in policies if policy["advantage"] == "given"]
    others = [policy for policy in policies if policy["advantage"] != "given"]
    assert max(len(given), len(others)) <= 1, "one policy gradient on rewards and one on the teacher at most"
    if not given:
        return dict(others[0]), None
    if not others:
        return dict(given[0]), 1.0
    teacher, rewards = others[0], given[0]
    return {**teacher, "coef": 1.0, "kl_coef": teacher["coef"] * teacher["kl_coef"]}, rewards["coef"]
