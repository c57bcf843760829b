"""Variables that schedulers and earlier commands leave behind: a run, or one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_megatron.errors import ConfigError
from opd_megatron.system.ranks import launched
from tests.cases.inputs import make_pair, train_words

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def reading(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> object:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return launched()


@pytest.mark.parametrize(
    "variables",
    [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": "0"}, {"WORLD_SIZE": "", "RANK": ""},
     {"RANK": "3"}, {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}],
)  # fmt: skip
def test_what_says_nothing_of_several_ranks_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    assert reading(monkeypatch, variables) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "x"}, "RANK='x' must be a whole number"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT='-1' must be a whole number"),
        ({"MASTER_ADDR": ""}, "without MASTER_ADDR: start with torchrun, or unset them"),
        ({"RANK": "", "MASTER_ADDR": "", "MASTER_PORT": ""}, "WORLD_SIZE=2 without RANK, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_variables_that_are_not_whole_are_one_line(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        reading(monkeypatch, WHOLE | changes)


def test_torchruns_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = reading(monkeypatch, WHOLE)
    assert (ranks.rank, ranks.world_size, ranks.meeting_point) == (1, 2, "node1:29500")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("variables", "code"), [({"WORLD_SIZE": "2"}, 2), ({"WORLD_SIZE": "", "RANK": "0"}, 0)])
def test_a_run_starts_or_says_why_not(tmp_path: Path, variables: dict[str, str], code: int) -> None:
    make_pair(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | variables
    done = subprocess.run(
        [sys.executable, "-m", "opd_megatron.cli", *train_words(tmp_path, "steps=1", "evaluation.every=0")],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert done.stderr.splitlines()[-1].startswith("opd-megatron: error: WORLD_SIZE=2 without")


def test_who_waits_for_other_ranks_says_so(tmp_path: Path) -> None:
    script = (
        "from opd_megatron.mcore.cpu import platform\n"
        "platform._PATIENCE_SECONDS = 0.2\n"
        "platform.init_distributed(start_timeout=3)\n"
    )
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert "rank 0 of 2 is waiting for the others at localhost:0" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "rank 0 of 2 did not meet the others at localhost:0 within parallel.start_timeout=3 s" in last
