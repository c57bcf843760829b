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

from opd_megatron.config.sections import NonNegativeFloat, Section
from opd_megatron.losses.objectives import KEYS, OBJECTIVES, Key, leaves, objective_terms, users_of

_TYPES: Any = Literal[tuple(OBJECTIVES)]


class CommonObjectiveConfig(Section):
    """What every objective has. `type` says which further keys have a meaning; any other is an error."""

    type: _TYPES = "reverse_kl"
    """Divergence at every response token, exact over the whole vocabulary; `on_policy_distill` and `jsd` are the
    sampled-token forms: a policy gradient that sees the sampled token alone."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits in the loss; sampled-token forms need it equal to `rollout.temperature`."""
    lambda_distill: NonNegativeFloat = 1.0
    """Weight of the divergence, or of the policy gradient that is its sampled-token form."""
    lambda_rl: NonNegativeFloat = 0.0
    """Weight of the policy gradient on rewards."""
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
    def used_keys(self) -> set[str]:
        """The keys of `KEYS` that have an effect."""
        return {key for leaf in leaves(self) for key in leaf.used_keys(self)}

    @model_validator(mode="after")
    def _rules(self) -> CommonObjectiveConfig:
        if self.lambda_distill == 0 and self.lambda_rl == 0:
            raise ValueError(
                "objective.lambda_distill=0 and objective.lambda_rl=0 leave nothing to minimise: raise lambda_distill"
            )
        for name in sorted((self.model_fields_set & KEYS.keys()) - self.used_keys):
            raise ValueError(self._unused(name))
        values: Any = self
        low, high = values.clip_low, values.clip_high
        if (low is None) != (high is None):
            raise ValueError(
                f"objective.clip_low={low} and objective.clip_high={high} must be given together: PPO uses 0.2 and 0.2"
            )
        if low is not None and values.truncation is not None:
            raise ValueError(
                f"objective.clip_low={low} has no effect beside objective.truncation={values.truncation}, whose ratio "
                "is 1 at the one update of a step: set objective.truncation=null to clip p / p_rollout instead"
            )
        return self

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
        """Leaves out the keys that the type does not use, so that a dump can be read again."""
        unused = KEYS.keys() - self.used_keys
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
