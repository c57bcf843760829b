"""The suite stays off GPUs unless it is asked for them."""

from __future__ import annotations

import os

import pytest

from tests.conftest import asks_for_gpu


@pytest.mark.parametrize(
    ("marks", "asks"),
    [
        ("", False), ("not long and not slurm", False), ("not gpu", False), ("not gpu and not long", False),
        ("gpu", True), ("gpu and not long", True), ("gpu or vllm", True), ("gpu_like", False), ("long", False),
    ],
)  # fmt: skip
def test_a_gpu_is_touched_only_by_name(marks: str, asks: bool) -> None:
    assert asks_for_gpu(marks) == asks


def test_this_run_sees_no_gpu_unless_it_was_asked_to(request: pytest.FixtureRequest) -> None:
    if not asks_for_gpu(str(request.config.getoption("markexpr"))):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
