"""What a configuration may say in short, as keys of the schema: `algorithm:` and `teacher_configs:` of the field's
examples, `recipe:`, and what follows from `objective.type: sft`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from opd_megatron.config.recipes import expand
from opd_megatron.losses.objectives import OBJECTIVES

GRPO = "grpo"
_NAMES = ("name", "type", "adv_estimator")
"""Keys that name the algorithm in a section of its own."""
_COEFFICIENTS = ("kl_coef", "lambda_coef", "beta", "lambda_rl", "lambda_distill")


def spell_out(tree: dict[str, Any]) -> dict[str, Any]:
    """Replaces them all. Raises ValueError for what contradicts itself, or is unknown."""
    for spell in (_algorithm, _teachers_by_task, expand, _given_answers_of_sft):
        tree = spell(tree)
    return tree


def _algorithm(tree: dict[str, Any]) -> dict[str, Any]:
    """`on_policy_distill`, or `{name: jsd, kl_coef: 1, lambda_coef: 0.5}`: an `objective.type`, or `grpo` (rewards
    alone), and its coefficients."""
    if "algorithm" not in tree:
        return tree
    given = tree["algorithm"]
    section = {"name": given} if isinstance(given, str) else given
    if not isinstance(section, dict):
        raise ValueError(f"algorithm={given!r} must be a name, or a section with one: {{name: jsd, kl_coef: 1}}")
    keys: dict[str, Any] = {}
    for key, value in section.items():
        if key in _NAMES:
            keys |= _named(value)
        elif key in _COEFFICIENTS:
            keys[key] = value
        else:
            raise ValueError(f"unknown key algorithm.{key}: known are {', '.join((*_NAMES, *_COEFFICIENTS))}")
    objective = tree.get("objective") or {}
    for key, value in keys.items():
        if objective.get(key, value) != value:
            raise ValueError(
                f"algorithm says {key}={value}, objective.{key} is {objective[key]}: leave one of them out"
            )
    rest = {key: value for key, value in tree.items() if key != "algorithm"}
    return rest | {"objective": {**keys, **objective}}


def _named(name: Any) -> dict[str, Any]:
    if name == GRPO:
        return {"lambda_distill": 0.0, "lambda_rl": 1.0}
    if name not in OBJECTIVES:
        near = get_close_matches(str(name), [*OBJECTIVES, GRPO], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join([*OBJECTIVES, GRPO])}"
        raise ValueError(f"unknown algorithm {name!r}: {hint}")
    return {"type": name}


def _teachers_by_task(tree: dict[str, Any]) -> dict[str, Any]:
    """`teacher_configs: {math: PATH, code: {path: PATH}}`: a teacher for each task, called as the task."""
    if "teacher_configs" not in tree:
        return tree
    given = tree["teacher_configs"]
    other = [key for key in ("teachers", "routes") if tree.get(key)]
    if other:
        raise ValueError(f"teacher_configs says what {other[0]} does: leave one of them out")
    if not isinstance(given, dict) or not given or not all(isinstance(each, str | dict) for each in given.values()):
        raise ValueError(
            f"teacher_configs={given!r} must name a teacher for each task: {{math: PATH, code: {{path: PATH}}}}"
        )
    rest = {key: value for key, value in tree.items() if key != "teacher_configs"}
    teachers = [{"name": task, **({"path": each} if isinstance(each, str) else each)} for task, each in given.items()]
    return rest | {
        "teachers": teachers,
        "routes": {task: each["name"] for task, each in zip(given, teachers, strict=True)},
    }


def _given_answers_of_sft(tree: dict[str, Any]) -> dict[str, Any]:
    """Nothing is sampled where `objective.type: sft` has no use for it."""
    objective, data = tree.get("objective"), tree.get("data", {})
    kind = objective.get("type") if isinstance(objective, dict) else getattr(objective, "type", None)
    if kind != "sft" or not isinstance(data, dict) or "on_policy_fraction" in data:
        return tree
    return tree | {"data": data | {"on_policy_fraction": 0.0}}
