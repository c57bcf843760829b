"""Validates the arguments of `linear_divergence` and `vocab_parallel_divergence` before communicating."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from opd_megatron.errors import ConfigError
from opd_megatron.losses.divergences import DIVERGENCES, PARAMETERS, Divergence

COMBINATIONS = ("logit_mean", "prob_mean")


@dataclass(frozen=True, slots=True)
class LossSpec:
    """One call: what it computes, and which vocabulary columns this rank computes it on."""

    divergence: Divergence
    lambda_distill: float
    """Weight of the divergence beside a policy-gradient term."""
    temperature: float
    teacher_weights: tuple[float, ...]
    """Sum to one."""
    combine: str
    group: dist.ProcessGroup | None
    """None when the vocabulary is not sharded."""
    first_column: int
    """Global index of this rank's first column."""
    columns: int
    """Columns of the true vocabulary held here, possibly none; they come first in the shard."""
    vocab_size: int
    dtype: torch.dtype
    """Of statistics and sums."""

    @property
    def teachers(self) -> int:
        return len(self.teacher_weights)


@dataclass(frozen=True, slots=True)
class LossArguments:
    """The scalar arguments of `linear_divergence` and `vocab_parallel_divergence`, as the caller gave them."""

    type: str = "reverse_kl"
    temperature: float = 1.0
    vocab_size: int | None = None
    group: dist.ProcessGroup | None = None
    teacher_weights: Sequence[float] | None = None
    combine: str = "logit_mean"
    lambda_distill: float = 1.0
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Those of `PARAMETERS` that were given; the divergence takes its own one."""

    @classmethod
    def of(cls, **arguments: Any) -> LossArguments:
        """Sorts the divergences' own parameters out of the keywords."""
        parameters = {name: arguments.pop(name) for name in PARAMETERS if name in arguments}
        return cls(**arguments, parameters=parameters)


def make_spec(arguments: LossArguments, widths: Sequence[int], dtypes: Sequence[torch.dtype]) -> LossSpec:
    """Checks the scalars; `widths` and `dtypes` are the shard's columns and type of the student, then the teachers."""
    _check_scalars(arguments)
    ranks, rank = _group_shape(arguments.group)
    vocab_size = _check_vocabulary(arguments.vocab_size, widths, ranks)
    first = rank * widths[0]
    family = DIVERGENCES[arguments.type]
    own = family.parameter
    value = 0.0 if own is None else arguments.parameters.get(own.name, own.default)
    return LossSpec(
        divergence=family.make(float(value)),
        lambda_distill=float(arguments.lambda_distill),
        temperature=float(arguments.temperature),
        teacher_weights=_normalised(arguments.teacher_weights, len(widths) - 1, arguments.combine),
        combine=arguments.combine,
        group=arguments.group if ranks > 1 else None,
        first_column=first,
        columns=min(max(vocab_size - first, 0), widths[0]),
        vocab_size=vocab_size,
        dtype=torch.float64 if torch.float64 in dtypes else torch.float32,
    )


def _check_scalars(arguments: LossArguments) -> None:
    if arguments.type not in DIVERGENCES:
        raise ConfigError(f"type={arguments.type!r} is not a divergence: use one of {', '.join(DIVERGENCES)}")
    for name, value in arguments.parameters.items():
        if PARAMETERS[name].above_zero:
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value} must be positive and finite: {PARAMETERS[name].meaning}")
            continue
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value} must lie in [0, 1]: {PARAMETERS[name].meaning}")
        reason = PARAMETERS[name].not_one
        if value == 1 and reason is not None:
            raise ConfigError(f"{name}=1 {reason} and is always 0: use less, {PARAMETERS[name].default} is usual")
    if not (math.isfinite(arguments.temperature) and arguments.temperature > 0):
        raise ConfigError(
            f"temperature={arguments.temperature} must be a positive finite number: use 1 for plain softmax"
        )
    if not (math.isfinite(arguments.lambda_distill) and arguments.lambda_distill >= 0):
        raise ConfigError(
            f"lambda_distill={arguments.lambda_distill} must be finite and not negative: 0 leaves the divergence out"
        )
    if arguments.combine not in COMBINATIONS:
        raise ConfigError(
            f"combine={arguments.combine!r} is not a way to mix teachers: use one of {', '.join(COMBINATIONS)}"
        )


def check_whole(type: str) -> None:
    """Requires a divergence that can be of events of several entries, as a top-k teacher's tail."""
    if DIVERGENCES[type].of_entries:
        raise ConfigError(
            f"type={type} cuts single entries of the vocabulary, which a top-k teacher or one of another vocabulary "
            "does not tell apart: choose another type, or give the teacher's hidden states"
        )


def check_matrix(name: str, matrix: torch.Tensor, like: torch.Tensor, rows: int | None = None) -> None:
    """Requires a floating 2-D tensor on the device of `like`, with `rows` rows if given."""
    if not isinstance(matrix, torch.Tensor) or matrix.dim() != 2:
        got = list(matrix.shape) if isinstance(matrix, torch.Tensor) else f"a {matrix.__class__.__name__}"
        raise ConfigError(f"{name} is {got} but must be a 2-D tensor: flatten batch and sequence into one dimension")
    if not matrix.is_floating_point():
        raise ConfigError(f"{name} has dtype {matrix.dtype} but must be floating: convert it to bfloat16 or float32")
    if matrix.device != like.device:
        raise ConfigError(f"{name} is on {matrix.device} but the student is on {like.device}: move it there")
    if rows is not None and len(matrix) != rows:
        raise ConfigError(f"{name} has {len(matrix)} rows but the student has {rows} tokens: pass the same tokens")


def check_projection(name: str, hidden: torch.Tensor, head: torch.Tensor) -> None:
    """Requires that `hidden` [T, h] and `head` [v, h] can be multiplied."""
    if hidden.shape[1] != head.shape[1]:
        raise ConfigError(
            f"{name} hidden size {hidden.shape[1]} differs from its head's {head.shape[1]}: pass the head [v, h] "
            "of the model the hidden states came from"
        )
    if hidden.dtype != head.dtype:
        raise ConfigError(f"{name} hidden is {hidden.dtype} but its head is {head.dtype}: convert one to the other")


def check_per_token(name: str, values: torch.Tensor | None, like: torch.Tensor) -> None:
    """Requires None, or one value for each row of `like` on its device."""
    if values is None:
        return
    if values.shape != like.shape[:1]:
        raise ConfigError(f"{name} has shape {list(values.shape)} but must be [{len(like)}]: one value for each token")
    if values.device != like.device:
        raise ConfigError(f"{name} is on {values.device} but the student is on {like.device}: move it there")


def check_gather_index(index: torch.Tensor | None, like: torch.Tensor) -> None:
    """Requires None, or int64 row numbers [T] on the device of `like`."""
    if index is None:
        return
    if index.dim() != 1 or index.dtype != torch.int64 or index.device != like.device:
        raise ConfigError(
            f"gather_index is {list(index.shape)} {index.dtype} on {index.device} but must be [T] int64 on "
            f"{like.device}: number the row of each token"
        )


def check_targets(
    targets: torch.Tensor | None, like: torch.Tensor, vocab_size: int, *, values: bool = True
) -> None:  # fmt: skip
    """Requires None, or int64 token ids of the true vocabulary (whose `values` are looked at), one for each row of
    `like`."""
    check_per_token("targets", targets, like)
    if targets is None:
        return
    if targets.dtype != torch.int64:
        raise ConfigError(f"targets has dtype {targets.dtype} but must be int64: convert it with .long()")
    if values and len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < vocab_size):
        raise ConfigError(
            f"targets range over [{int(targets.min())}, {int(targets.max())}] but must lie in [0, {vocab_size}): "
            "pass token ids of response tokens only"
        )


def _group_shape(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Returns (ranks of the group, this rank's place in it)."""
    if group is None:
        return 1, 0
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ConfigError(f"group={group!r} must be a process group that holds this rank: pass one, or None")
    return dist.get_world_size(group), dist.get_rank(group)


def _check_vocabulary(vocab_size: int | None, widths: Sequence[int], ranks: int) -> int:
    held = widths[0] * ranks
    if vocab_size is None:
        vocab_size = held
    if not 1 <= vocab_size <= held:
        raise ConfigError(
            f"vocab_size={vocab_size} must lie in [1, {held}], the columns that {ranks} ranks of {widths[0]} hold: "
            "pass the true vocabulary size, or shards that cover it"
        )
    for index, width in enumerate(widths[1:]):
        # Shards of other widths start at other columns, unless the first rank holds the whole vocabulary.
        if width != widths[0] and min(width, widths[0]) < vocab_size:
            raise ConfigError(
                f"teacher {index} has {width} columns a rank but the student has {widths[0]}: reshard or pad its "
                "head to the student's columns, and set vocab_size where only padding differs"
            )
    return vocab_size


def _normalised(weights: Sequence[float] | None, teachers: int, combine: str) -> tuple[float, ...]:
    if teachers == 0:
        raise ConfigError("teachers is empty but a divergence needs one or more: pass at least one teacher")
    if weights is None:
        return (1 / teachers,) * teachers
    values = [float(weight) for weight in weights]
    if len(values) != teachers:
        raise ConfigError(
            f"teacher_weights={values} must hold one weight for each of {teachers} teachers: pass as many"
        )
    extrapolates = combine == "logit_mean" and all(math.isfinite(weight) and weight for weight in values)
    if not (extrapolates and math.fsum(values) > 0) and not all(math.isfinite(x) and x > 0 for x in values):
        raise ConfigError(
            f"teacher_weights={values} must be positive and finite (with logit_mean some may be below 0, of a positive "
            "sum): leave out a teacher with no say"
        )
    return tuple(weight / math.fsum(values) for weight in values)
