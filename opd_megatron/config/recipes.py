"""The field's recipes by name (`recipe:`), each a few keys of a configuration. Imports no torch.

A recipe fills in what a configuration leaves out. What makes it the recipe cannot be given otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One of them."""

    description: str
    """A line of docs/objectives.md."""
    paper: str
    """A Markdown link."""
    fixed: Mapping[str, Any]
    """Key -> value that makes it what it is."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Key -> value that may be given otherwise."""
    further: Callable[[Tree], None] | None = None
    """Fills in what follows from other keys."""


def _end_sampling_there(tree: Tree) -> None:
    rewards = tree.get("rewards") or {}
    if not (rewards.get("task") or rewards.get("tasks")):  # who judges an answer needs all of it
        _fill(tree, "rollout.max_new_tokens", _at(tree, "objective.prefix_tokens"))


def _extrapolate(tree: Tree) -> None:
    teachers = tree.setdefault("teachers", [{"path": "teacher"}])
    if not isinstance(teachers, list) or len(teachers) != 1 or not isinstance(teachers[0], dict):
        return  # it is there already, or the rules of `teachers` say what is wrong
    weight = teachers[0].setdefault("weight", 1.25)
    if isinstance(weight, int | float) and weight > 1:
        dtype = (tree.get("student") or {}).get("dtype", "auto")
        teachers.append({"name": "initial", "path": "student", "weight": 1 - weight, "dtype": dtype})
        return
    raise ValueError(
        f"recipe=exopd needs teachers.0.weight above 1, got {weight}: 1.25 is usual, 1 is no extrapolation"
    )


_TM = "[On-Policy Distillation](https://thinkingmachines.ai/blog/on-policy-distillation/)"
RECIPES: dict[str, Recipe] = {
    "mixed": Recipe(
        "w KL(q‖p) + (1 - w) KL(p‖q), w = `forward_weight`", "",
        {"objective.type": "mixed"}, {"objective.forward_weight": 0.5},
    ),
    "eopd": Recipe(
        "reverse KL, and forward KL too where the teacher is unsure", "[EOPD](https://arxiv.org/abs/2603.07079)",
        {"objective.type": "eopd"}, {"objective.entropy_threshold": 0.8},
    ),
    "exopd": Recipe(
        "reverse KL to q^λ r^(1 - λ) / Z, r the student at the start, λ = `teachers.0.weight` above 1: the teacher, "
        "extrapolated",
        "[ExOPD](https://arxiv.org/abs/2602.12125)",
        {"objective.type": "reverse_kl", "objective.combine": "logit_mean"}, further=_extrapolate,
    ),
    "iw_opd": Recipe(
        "sampled tokens, early ones amplified while student and teacher still agree",
        "[IW-OPD](https://arxiv.org/abs/2606.22600)",
        {"objective.type": "on_policy_distill"}, {"objective.prefix_gamma": 0.5},
    ),
    "prefix": Recipe(
        "the first tokens of an answer alone; sampling ends there, unless answers are judged",
        "[Prefixes](https://arxiv.org/abs/2602.15260)",
        {}, {"objective.prefix_tokens": 128}, _end_sampling_there,
    ),
    "entry_clip": Recipe(
        "forward KL, to which no entry of the vocabulary adds more than `entry_clip`",
        "[OPSD](https://arxiv.org/abs/2601.18734)",
        {"objective.type": "clipped_forward_kl"}, {"objective.entry_clip": 0.05},
    ),
    "mopd": Recipe(
        "sampled tokens, weighted by p / p_rollout where that is in a window, left out elsewhere",
        "[MOPD](https://arxiv.org/abs/2601.02780)",
        {"objective.type": "on_policy_distill"}, {"objective.ratio_window": [0.2, 5.0]},
    ),
    "thinking_machines": Recipe(
        "sampled tokens, each for its own log q - log p alone (discount 0), by importance sampling", _TM,
        {"objective.type": "on_policy_distill", "objective.truncation": None},
    ),
}  # fmt: skip


def expand(tree: Tree) -> Tree:
    """Fills the recipe that a configuration names into it.

    Raises:
        ValueError: there is none of that name, or a key contradicts it.
    """
    name = tree.get("recipe")
    if name is None:
        return tree
    if name not in RECIPES:
        near = get_close_matches(str(name), RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(RECIPES)}, or leave it out"
        raise ValueError(f"recipe={name!r} is not one: {hint}")
    recipe, tree = RECIPES[name], copy.deepcopy(tree)
    for key, value in recipe.fixed.items():
        if _fill(tree, key, value) != value:
            raise ValueError(f"recipe={name} has {key}={value}, got {_at(tree, key)}: leave one of them out")
    for key, value in recipe.defaults.items():
        _fill(tree, key, value)
    if recipe.further is not None:
        recipe.further(tree)
    return tree


def _fill(tree: Tree, key: str, value: Any) -> Any:
    """Sets a key where it has no value; returns what it then has."""
    section, _, name = key.partition(".")
    if tree.get(section) is None:
        tree[section] = {}
    found = tree[section]
    if not isinstance(found, dict):
        return value  # the section's own rules say what is wrong
    return found.setdefault(name, value)


def _at(tree: Tree, key: str) -> Any:
    section, _, name = key.partition(".")
    return tree[section].get(name)
