"""A step asks the device for nothing while it goes through its micro batches: an answer waits for all before it."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.mcore.one_step import Run
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny

LENGTHS = [9, 4, 6, 11, 5, 8]
ASKS = (
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique", "_unique2",
    "unique_consecutive", "unique_dim", "repeat_interleave",
)  # fmt: skip

ON_THE_HOST = {"whole_sequences.py:__init__", "context.py:natural_order", "random.py:fork"}
"""Where tensors are made on the host, from lengths, and states of generators lie."""


class Host(torch.Tensor):
    """A tensor that stands for one on the host; what goes `to` a device is an ordinary one."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(function, types, args, kwargs or {})
        if function in (torch.Tensor.to, torch.Tensor.tolist) and isinstance(found, torch.Tensor):
            return found.as_subclass(torch.Tensor)
        return found


class Asked(TorchDispatchMode):
    """Counts operations whose outcome, or its size, has to be known before Python goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        chosen = name in ASKS
        if name in ("index", "index_put", "index_put_"):
            chosen = any(each is not None and each.dtype == torch.bool for each in args[1])
            # One number put at the places of a mask is `masked_fill`, which knows them when it runs.
            chosen &= not (name.startswith("index_put") and args[2].numel() == 1)
        if chosen and not any(isinstance(each, Host) for each in tensors):
            stack = traceback.extract_stack()[:-1]
            ours = next(each for each in reversed(stack) if "opd_megatron" in each.filename)
            last = next(each for each in reversed(stack) if "/torch/" not in each.filename)
            places = [f"{Path(each.filename).name}:{each.name}" for each in (ours, last)]
            if not ON_THE_HOST & {*places}:
                self.places[f"{name} in {' '.join(places)}"] += 1
        return function(*args, **kwargs or {})


def _on_a_device(batch: Any) -> Any:
    """A batch as it is where there is a device: its copy on the host is apart."""
    host = batch._map(lambda values: values.as_subclass(Host))
    return replace(batch, copy_on_host=host)


def _asked(
    rank: int, world: int, pair: tuple[Path, Path], layout: dict[str, Any], objective: dict[str, Any]
) -> list[dict[str, int]]:
    """What a step asks in two and in six micro batches."""
    from opd_megatron.losses.core import linear_pass
    from opd_megatron.teacher import ask_teachers
    from tests.data.test_packing import rollouts_of

    linear_pass._times = lambda gradient, factor: gradient.mul_(factor)  # a CPU's saves a pass by looking
    run, found = Run(pair, layout, 1000, **objective), []
    for tokens in (45, 12):
        run.builder = replace(run.builder, tokens=tokens)
        step = run.builder.build(rollouts_of(LENGTHS))
        step.score([0.5, -0.5, 0.1, 0.2, -0.3, 0.4])
        for place, batch in enumerate(step):
            step[place] = _on_a_device(batch)
        with Asked() as asked:
            run.student.update(step, ask_teachers(run.teachers, step), run.config.objective, run.models.vocab_size)
        found.append({"micro batches": len(step), **asked.places})
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    student = save_tiny(root / "student", seed=1, num_hidden_layers=2)
    return student, save_tiny(root / "teacher", seed=2, num_hidden_layers=2)


@pytest.mark.parametrize("layout", [
    {}, {"tensor": 2, "sequence_parallel": True}, {"context": 2}, {"pipeline": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("objective", [
    {}, {"objective.type": "gkd"}, {"objective.type": "on_policy_distill", "objective.ratio_level": "sequence"},
], ids=str)  # fmt: skip
def test_more_micro_batches_ask_no_more_of_the_device(
    pair: tuple[Path, Path], layout: dict[str, Any], objective: dict[str, Any]
) -> None:
    ranks = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    for few, many in run_ranks(ranks, _asked, pair, layout, objective):
        assert many.pop("micro batches") > few.pop("micro batches")
        assert many == few


def test_the_counter_counts() -> None:
    values = torch.tensor([1.0, 0.0])
    with Asked() as asked:
        from opd_megatron.types import places_of

        places_of(values > 0, values.device)
    assert sum(asked.places.values()) == 1
    with Asked() as asked:
        places_of((values > 0).as_subclass(Host), values.device)
    assert not asked.places
