from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

MINUTES_FIRST = (
    "convert/test_round_trip.py", "mcore/test_checkpoint.py", "weights/test_round_trip.py",
    "rollout/test_vllm_engine.py",
    "e2e/test_launch_scripts.py", "weight_sync/test_shard_to_shard.py", "e2e/test_vllm_run.py", "e2e/test_fleet.py",
    "losses/test_triton_kernels.py", "distributed/test_losses_tp.py", "rollout/test_vllm_fleet.py",
    "rollout/test_vllm_families.py", "teacher/test_placements.py", "planning/test_coverage.py", "test_cli.py",
)  # fmt: skip
"""Files that take longest, handed out first, so that the workers end together."""


def asks_for_gpu(marks: str) -> bool:
    """Whether an expression of `-m` selects a test that is marked `gpu` and nothing else."""
    from _pytest.mark.expression import Expression

    named = re.search(r"\bgpu\b", marks) is not None
    return named and Expression.compile(marks).evaluate(lambda name, **_: name == "gpu")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the suite off GPUs unless it is asked for them (`-m gpu`): its ranks are more than there are cards, and
    what a CPU shows is meant to be shown on every machine.

    Shares the cores out among the workers: with more threads than cores they mostly wait for each other.
    """
    if not asks_for_gpu(str(config.getoption("markexpr"))):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if workers is not None:
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(workers)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    order = {tests / name: position for position, name in enumerate(MINUTES_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each of CONFIGS; read only."""
    from tests.weights.checkpoints import CONFIGS, write_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(root / name, config) for name, config in CONFIGS.items()}
