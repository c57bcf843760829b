"""Where a tensor of a checkpoint belongs in transformers' model: it stacks a layer's experts, which files hold one by
one."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def parameter_named(state: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Finds the parameter, or the part of one, that the tensor `name` fills; None where the model has none."""
    expert = _EXPERT.fullmatch(name)
    if expert is None or name in state:
        return state.get(name)
    prefix, index, part = expert.groups()
    if part == "down":
        return state[f"{prefix}.down_proj"][int(index)]
    return state[f"{prefix}.gate_up_proj"][int(index)].chunk(2)[part == "up"]
