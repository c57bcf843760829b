"""The section `objective:`. Its types, and the keys that only some of them use, are those of `losses.objectives`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)

from opd_megatron.config.sections import NonNegativeFloat, NonNegativeInt, Section
from opd_megatron.losses.objectives import KEYS, OBJECTIVES, Key, leaves, objective_terms, users_of
from opd_megatron.losses.schedules import WEIGHTS, at_step, largest

_TYPES: Any = Literal[tuple(OBJECTIVES)]
_WEIGHTS: Any = Literal[WEIGHTS]


class CommonObjectiveConfig(Section):
    """What every objective has. `type` says which further keys have a meaning; any other is an error."""

    type: _TYPES = "reverse_kl"
    """Divergence at every response token, exact over the whole vocabulary; `on_policy_distill` and `jsd` are the
    sampled-token forms: a policy gradient that sees the sampled token alone. `sft` is the likelihood of given answers,
    without a teacher."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits in the loss; sampled-token forms need it equal to `rollout.temperature`."""
    lambda_distill: NonNegativeFloat = 1.0
    """Weight of what `type` says: the divergence, or the policy gradient that is its sampled-token form. With 0 (and
    lambda_rl above 0) it is reinforcement learning alone, and no teacher is loaded."""
    lambda_rl: NonNegativeFloat = 0.0
    """Weight of the policy gradient on rewards."""
    sft_coef: NonNegativeFloat = 0.0
    """Weight of -log p(a) on the tokens of given answers (`data.on_policy_fraction` below 1)."""
    reference_kl: NonNegativeFloat = 0.0
    """Weight of KL(p|reference), exact at every response token. The reference is the student as it was at the start,
    or the entry of `teachers` that is named `reference`."""
    schedules: dict[_WEIGHTS, dict[NonNegativeInt, NonNegativeFloat]] = Field(default_factory=dict)
    """Weights that change, by step: `{lambda_rl: {0: 0, 50: 0.5}}` is 0 at the first step, 0.5 from step 50 on, and a
    straight line between. In the place of the weight's own key."""
    prefix_tokens: PositiveInt | None = None
    """Train on so many first tokens of every answer alone. Rewards are of the whole answer."""
    combine: Literal["logit_mean", "prob_mean"] = "logit_mean"
    """How several teachers are mixed."""
    balance: Literal["tokens", "samples", "tasks"] = "tokens"
    """What has equal weight: `tokens`, so that long answers count more; `samples`, every answer alike; `tasks`, every
    task by its number of answers and all tokens of a task alike, so that a task with short answers is not drowned."""
    chunk_tokens: PositiveInt | None = None
    """Tokens whose logits exist at one time; chosen for the cache by default."""

    @property
    def is_sampled(self) -> bool:
        """Whether the loss has a policy gradient on the sampled tokens."""
        return any(term.policy for term in objective_terms(self))

    @property
    def needs_teacher(self) -> bool:
        """Whether any step of the run asks one."""
        return OBJECTIVES[self.type].needs_teacher and largest(self, "lambda_distill") > 0

    @property
    def uses_rewards(self) -> bool:
        """Whether any step has a policy gradient on rewards."""
        return largest(self, "lambda_rl") > 0

    def at(self, step: int) -> CommonObjectiveConfig:
        """The same with the weights of a step, counted from 0."""
        return self.model_copy(update={name: at_step(self, name, step) for name in self.schedules})

    @property
    def used_keys(self) -> set[str]:
        """The keys of `KEYS` that have an effect."""
        return {key for leaf in leaves(self) for key in leaf.used_keys(self)}

    @model_validator(mode="after")
    def _rules(self) -> CommonObjectiveConfig:
        self._check_weights()
        for name in sorted((self.model_fields_set & KEYS.keys()) - self.used_keys):
            raise ValueError(self._unused(name))
        values: Any = self
        window = values.ratio_window
        if window is not None and window[0] >= window[1]:
            raise ValueError(
                f"objective.ratio_window={list(window)} must be [low, high], low below high: MOPD has [0.2, 5]"
            )
        low, high = values.clip_low, values.clip_high
        if (low is None) != (high is None):
            raise ValueError(
                f"objective.clip_low={low} and objective.clip_high={high} must be given together: PPO uses 0.2 and 0.2"
            )
        if low is not None and values.truncation is not None and window is None:
            raise ValueError(
                f"objective.clip_low={low} has no effect beside objective.truncation={values.truncation}, whose ratio "
                "is 1 at the one update of a step: set objective.truncation=null to clip p / p_rollout instead"
            )
        return self

    def _check_weights(self) -> None:
        for name, points in self.schedules.items():
            if not points:
                raise ValueError(f"objective.schedules.{name} has no points: give {{step: value}}, or leave it out")
            if name in self.model_fields_set:
                raise ValueError(
                    f"objective.{name}={getattr(self, name)} has no effect beside objective.schedules.{name}: leave "
                    "one of them out"
                )
        for step in sorted({0, *(step for points in self.schedules.values() for step in points)}):
            if not any(at_step(self, name, step) for name in ("lambda_distill", "lambda_rl", "sft_coef")):
                when = f" at step {step}" if self.schedules else ""
                raise ValueError(
                    f"objective.lambda_distill=0 and objective.lambda_rl=0 leave nothing to minimise{when}: raise "
                    "lambda_distill"
                )
        if self.is_sampled and (self.type == "sft" or largest(self, "sft_coef") > 0):
            other = "objective.type=sft" if self.type == "sft" else "objective.sft_coef"
            raise ValueError(
                f"{other} trains on given answers, and "
                + ("objective.lambda_rl" if self.uses_rewards else f"objective.type={self.type}")
                + " on what the student has sampled: leave one of them out"
            )
        if self.temperature != 1 and (self.type == "sft" or largest(self, "sft_coef") > 0):
            raise ValueError(
                f"objective.temperature={self.temperature} does not go with a likelihood "
                f"({'objective.type=sft' if self.type == 'sft' else 'objective.sft_coef'}), which is at 1: leave it out"
            )

    def _unused(self, name: str) -> str:
        written = f"objective.{name}={getattr(self, name)}"
        beside = OBJECTIVES[self.type].replaced.get(name)
        if beside is not None:
            other = f"objective.{beside}={getattr(self, beside)}"
            return f"{written} has no effect beside {other} with objective.type={self.type}: leave one of them out"
        return (
            f"{written} has no effect with objective.type={self.type}: leave it out, or choose a type that uses it "
            f"({', '.join(users_of(name))})"
        )

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out the keys that have no effect, so that a dump can be read again."""
        unused = (KEYS.keys() - self.used_keys) | self.schedules.keys()
        return {name: value for name, value in serialize(self).items() if name not in unused}


def _field(key: Key) -> Any:
    return key.annotation, Field(default=key.default, description=f"{key.meaning}. Of {', '.join(users_of(key.name))}.")


if TYPE_CHECKING:
    ObjectiveConfig = CommonObjectiveConfig
else:
    ObjectiveConfig = create_model(
        "ObjectiveConfig",
        __base__=CommonObjectiveConfig,
        __module__=__name__,
        __doc__=CommonObjectiveConfig.__doc__,
        **{key.name: _field(key) for key in KEYS.values()},
    )
