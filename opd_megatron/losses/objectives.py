"""What `objective.type` can be, one entry each: its formula, its terms, its own keys and its metrics.

The configuration makes its keys from this table, the student its loss, and the table of docs/objectives.md is checked
against it. A new divergence is one line here beside its entry in `divergences.DIVERGENCES`. Nothing here imports torch.

An objective is a list of terms that are added up: an exact divergence, policy gradients on the sampled tokens, the
likelihood of given ones. They are computed in one pass over the vocabulary, but for a second divergence, which has a
pass of its own. Rewards, likelihood and a reference are terms of their own beside any `type`.
"""

# ruff: noqa: RUF001  formulae are written with the letters of the papers

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from opd_megatron.errors import ConfigError
from opd_megatron.losses.divergences import BETA, DIVERGENCES, LAMBDA_COEF, PARAMETERS, Parameter
from opd_megatron.losses.schedules import largest

if TYPE_CHECKING:
    import torch

    from opd_megatron.types import Batch

DIVERGENCE_METRICS = (
    "loss", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "top1_agreement",
    "nll", "teacher_nll", "k1", "k2", "k3", "k1_gap",
)  # fmt: skip
"""Token means of every objective. `nll` and `teacher_nll` are of the targets; `k1` to `k3` estimate `reverse_kl` from
them where the student sampled them, and `k1_gap` says by how much `k1` misses it."""
ALONE_METRICS = ("loss", "student_entropy", "nll")
"""Those of them that are there without a teacher."""
POLICY_METRICS = ("divergence", "policy_loss", "advantage", "ratio", "clip_fraction")
"""What a policy gradient adds: the exact divergence of the objective's `type`, and its own loss without its weight."""
SFT_LOSS, REFERENCE_KL, FORWARD_SHARE = "sft_loss", "reference_kl", "forward_share"
"""`sft_coef`'s addend of the loss without that weight; KL(p|reference); the share of tokens that have a second
divergence."""


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
    likelihood: float = 0.0
    """Weight of -log p(a) of the targets that were given."""
    teacher_entropy_above: float | None = None
    """Where it is set, the divergence is of those tokens alone, and has a pass of its own after the others."""
    of_reference: bool = False
    """The divergence is from the reference model, in a pass of its own."""

    @property
    def is_further(self) -> bool:
        """Whether it has a pass of its own."""
        return self.of_reference or self.teacher_entropy_above is not None

    def metrics(self, teachers: bool) -> tuple[str, ...]:
        """Names what it reports, with teachers or without."""
        if self.of_reference:
            return (REFERENCE_KL,)
        if self.teacher_entropy_above is not None:
            return (FORWARD_SHARE,)
        names: tuple[str, ...] = DIVERGENCE_METRICS if teachers else ALONE_METRICS
        if self.policy:
            names += POLICY_METRICS if teachers else POLICY_METRICS[1:]
        return names + ((SFT_LOSS,) if self.likelihood else ())


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
    further: Callable[[Any], Term] | None = None
    """A second divergence."""
    needs_teacher: bool = True

    def used_keys(self, values: Any) -> tuple[str, ...]:
        """The keys that have an effect with these values."""
        return tuple(key for key in self.keys if getattr(values, self.replaced.get(key, ""), None) is None)


def _of_parameter(parameter: Parameter) -> Key:
    bounds: dict[str, Any] = {"ge": 0} | ({"le": 1} if parameter.not_one is None else {"lt": 1})
    if parameter.above_zero:
        bounds = {"gt": 0}
    return Key(parameter.name, Annotated[float, Field(**bounds)], parameter.default, parameter.meaning)


_Weight = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
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
        Key(
            "ratio_window", tuple[_Weight, _Positive] | None, None,
            "[low, high], in the place of `truncation`: the importance weight is p / p_rollout where it lies in there, "
            "and a token outside does not count (MOPD: 0.2 and 5)",
        ),
        Key(
            "prefix_gamma", _Weight | None, None,
            "Amplifies the advantage of early tokens: by 1 + gamma (1 - d_t / d), d_t the sum of "
            "|log q - log p_rollout| over the answer's tokens before this one, d over all of them (IW-OPD: 0.5)",
        ),
        Key(
            "entropy_threshold", _Weight, 0.8,
            "Nats of the teacher's entropy, at the objective's temperature, above which the forward KL is added",
        ),
    )
}  # fmt: skip
_RATIO_KEYS = ("truncation", "clip_low", "clip_high", "ratio_level", "ratio_window")
_BESIDE_WINDOW = dict.fromkeys(("truncation", "clip_low", "clip_high"), "ratio_window")


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
    window = getattr(values, "ratio_window", None)
    cap = values.truncation if window is None else None
    ratios = {"clip": clip, "importance_cap": cap, "level": values.ratio_level, "window": window}
    return {"coef": weight, **advantage, **ratios}


def _on_policy_distill(values: Any) -> Term:
    # A sampled form reports its divergence exactly, with no weight in the loss.
    exact = {"type": "reverse_kl", "lambda_distill": 0.0}
    policy = _policy(values, values.lambda_distill, advantage="kl", kl_coef=values.kl_coef)
    return Term(exact, policy | {"prefix_gamma": getattr(values, "prefix_gamma", None)})


def _jsd(values: Any) -> Term:
    kind, own = ("jsd", BETA) if values.lambda_coef is None else ("lambda_jsd", LAMBDA_COEF)
    parameter = {own.name: getattr(values, own.name)}
    exact = {"type": "gkd" if values.lambda_coef is None else "lambda_jsd", "lambda_distill": 0.0, **parameter}
    return Term(exact, _policy(values, values.lambda_distill, advantage=kind, kl_coef=values.kl_coef, **parameter))


def _rewards(values: Any) -> Term:
    return Term(policy=_policy(values, values.lambda_rl, advantage="given"))


def _eopd_forward(values: Any) -> Term:
    forward = {"type": "forward_kl", "lambda_distill": values.lambda_distill}
    return Term(forward, teacher_entropy_above=values.entropy_threshold)


def _sft(values: Any) -> Term:
    return Term({"type": "reverse_kl", "lambda_distill": 0.0}, likelihood=values.lambda_distill)


def _reference(values: Any) -> Term:
    return Term({"type": "reverse_kl", "lambda_distill": values.reference_kl}, of_reference=True)


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
    "mixed": _exact("mixed", "w KL(q‖p) + (1 − w) KL(p‖q), w = `forward_weight`"),
    "clipped_reverse_kl": _exact(
        "clipped_reverse_kl", "Σ min(p log(p / q), c) over the vocabulary, c = `entry_clip`",
        "[OPSD](https://arxiv.org/abs/2601.18734)",
    ),
    "clipped_forward_kl": _exact(
        "clipped_forward_kl", "Σ min(q log(q / p), c) over the vocabulary, c = `entry_clip`",
        "[OPSD](https://arxiv.org/abs/2601.18734)",
    ),
    "eopd": Objective(
        "KL(p‖q), and KL(q‖p) is added where the teacher's entropy is above `entropy_threshold`",
        lambda values: Term({"type": "reverse_kl", "lambda_distill": values.lambda_distill}), ("entropy_threshold",),
        paper="[EOPD](https://arxiv.org/abs/2603.07079)", further=_eopd_forward,
    ),
    "on_policy_distill": Objective(
        "policy gradient, advantage `kl_coef` (log q(a) − log p_rollout(a)) of the sampled token a",
        _on_policy_distill, ("kl_coef", *_RATIO_KEYS, "prefix_gamma"), _BESIDE_WINDOW,
        paper="[On-Policy Distillation](https://thinkingmachines.ai/blog/on-policy-distillation/)",
    ),
    "jsd": Objective(
        "policy gradient, advantage minus the derivative of `gkd`'s divergence at p(a), or of `lambda_jsd`'s where "
        "`lambda_coef` is set",
        _jsd, (BETA.name, LAMBDA_COEF.name, "kl_coef", *_RATIO_KEYS), {BETA.name: LAMBDA_COEF.name} | _BESIDE_WINDOW,
    ),
    "sft": Objective(
        "−log p(a) of the tokens a of given answers (`data.answers`), without a teacher", _sft, needs_teacher=False
    ),
}  # fmt: skip

REWARDS = Objective(
    "policy gradient on the rewards' advantages, beside any type: `lambda_rl` above 0",
    _rewards, _RATIO_KEYS, _BESIDE_WINDOW, paper="[PPO](https://arxiv.org/abs/1707.06347)", needs_teacher=False,
)  # fmt: skip
LIKELIHOOD = Objective(
    "−log p(a) of the tokens of given answers, beside any exact type: `sft_coef` above 0",
    lambda values: Term(likelihood=values.sft_coef), needs_teacher=False,
)  # fmt: skip
REFERENCE = Objective(
    "KL(p‖reference), beside any type: `reference_kl` above 0", _reference, needs_teacher=False
)  # fmt: skip


def leaves(values: Any) -> list[Objective]:
    """Lists the leaves that a section `objective:` selects, at any step."""
    beside = {"lambda_rl": REWARDS, "sft_coef": LIKELIHOOD, "reference_kl": REFERENCE}
    return [OBJECTIVES[values.type], *(leaf for weight, leaf in beside.items() if largest(values, weight) > 0)]


def objective_terms(values: Any) -> list[Term]:
    """Lists the terms whose sum is minimised."""
    chosen = leaves(values)
    return [leaf.term(values) for leaf in chosen] + [leaf.further(values) for leaf in chosen if leaf.further]


def users_of(key: str) -> list[str]:
    """Lists the types that use a key of `KEYS`."""
    return [name for name, leaf in OBJECTIVES.items() if key in leaf.keys]


def metric_names(terms: Iterable[Term], *, teachers: bool = True) -> tuple[str, ...]:
    """Names the token means that a step reports, in order; `teachers`: whether there are any."""
    return tuple(dict.fromkeys(name for term in terms for name in term.metrics(teachers)))


def loss_arguments(terms: Sequence[Term], batch: Batch, mask: torch.Tensor) -> dict[str, Any]:
    """Merges the terms into the arguments of one call of `linear_divergence_terms`, on the tokens of `mask` [B, S], or
    at places (`types.places_of`).

    Raises:
        ConfigError: two terms with a divergence each (one pass computes one), or none.
    """
    terms = [term for term in terms if not term.is_further]
    divergences = [dict(term.divergence) for term in terms if term.divergence]
    if len(divergences) != 1:
        raise ConfigError(f"an objective needs one divergence, got {len(divergences)}: leave the others out")
    likelihood = _likelihood(sum(term.likelihood for term in terms), batch, mask)
    policies = [term.policy for term in terms if term.policy]
    return divergences[0] | {"policy": _policy_term(policies, likelihood, batch, mask)}


def _likelihood(weight: float, batch: Batch, mask: torch.Tensor) -> torch.Tensor | None:
    if not weight:
        return None
    from opd_megatron.types import at_places

    given = batch.weights.new_ones(batch.weights.shape) if batch.given is None else batch.given
    return weight * at_places(given, mask)


def _policy_term(
    policies: list[Mapping[str, Any]], likelihood: torch.Tensor | None, batch: Batch, mask: torch.Tensor
) -> Any:
    from opd_megatron.losses.policy import PolicyTerm
    from opd_megatron.types import at_places

    if not policies:
        return None if likelihood is None else PolicyTerm(likelihood=likelihood)
    assert likelihood is None, "the likelihood of given answers beside a policy gradient on sampled ones"
    assert batch.rollout_logprobs is not None, "a policy gradient needs the rollouts' log-probabilities"
    fields, rewards = _merged(policies)
    of_sequences = fields["level"] == "sequence" or fields.get("prefix_gamma") is not None
    advantages = None
    if rewards is not None:
        assert batch.advantages is not None, "a term of rewards needs advantages"
        advantages = rewards * at_places(batch.advantages, mask)
    return PolicyTerm(
        rollout_logprobs=at_places(batch.rollout_logprobs, mask),
        advantages=advantages,
        sequence_ids=at_places(batch.sequence_ids, mask) if of_sequences else None,
        sequence_counts=_counts(batch, mask) if of_sequences else None,
        **fields,
    )


def _counts(batch: Batch, mask: torch.Tensor) -> tuple[int, ...] | None:
    """Tokens of each sequence among those of the mask, in order, where the host knows them: of all response tokens."""
    ids = batch.on_host.sequence_ids[batch.response_mask]
    if mask.dim() == 2 or len(ids) != len(mask):
        return None
    return tuple(ids.unique_consecutive(return_counts=True)[1].tolist())


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
