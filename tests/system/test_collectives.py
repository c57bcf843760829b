"""An error of one rank is an error of all, with the remedy of its cause and of nothing else."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from opd_megatron.errors import CheckpointError, ConfigError, OPDError, RolloutError
from opd_megatron.mcore.cpu.platform import init_distributed
from opd_megatron.system.collectives import all_ranks_max, on_all_ranks, on_rank_0, raise_on_all_ranks
from tests.ranks import run_ranks

CAUSES: dict[str, tuple[Exception, str]] = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "free disk space"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "free disk space"),
    "rights": (PermissionError(errno.EACCES, "Permission denied"), "check the rights"),
    "read only": (OSError(errno.EROFS, "Read-only file system"), "check the rights"),
    "gone": (FileNotFoundError(errno.ENOENT, "No such file"), "make it or"),
    "anything else": (KeyError("a name"), "ask somebody"),
}
REMEDIES = {words for _, words in CAUSES.values()}


def _raised(rank: int, world: int, failing: int) -> list[tuple[str, str]]:
    init_distributed()
    seen = []
    for error, _ in CAUSES.values():
        with pytest.raises(OPDError) as raised:
            raise_on_all_ranks(
                error if rank == failing else None, "it was not written", CheckpointError, remedy="ask somebody"
            )
        seen.append((type(raised.value).__name__, str(raised.value)))
    return seen


@pytest.mark.parametrize("failing", [0, 1])
def test_every_rank_raises_the_cause_with_its_own_remedy(failing: int) -> None:
    first, second = run_ranks(2, _raised, failing)
    assert first == second
    for (kind, message), (error, remedy) in zip(first, CAUSES.values(), strict=True):
        assert kind == "CheckpointError"
        assert message.startswith(f"it was not written (rank {failing}: {type(error).__name__}")
        assert [words for words in REMEDIES if words in message] == [remedy]


def _own_errors(rank: int, world: int) -> Any:
    init_distributed()
    with pytest.raises(ConfigError) as block, on_all_ranks("it was not read", CheckpointError):
        _fail_on(rank == 1, ConfigError("steps=0 must be positive: raise it"))
    with on_all_ranks("never", CheckpointError):
        pass
    with pytest.raises(RolloutError) as host:
        on_rank_0(lambda: _fail(RolloutError("the engine refused")), "the engine failed", OPDError)
    with pytest.raises(ZeroDivisionError if rank == 0 else RolloutError) as bug:
        on_rank_0(lambda: 1 // 0, "the engine failed", RolloutError)
    with pytest.raises(CheckpointError) as damaged:
        on_rank_0(lambda: _fail(ValueError("no JSON")), "it is damaged", CheckpointError, remedy="remove it")
    result = on_rank_0(lambda: {"from": os.getpid()}, "never", OPDError)
    return str(block.value), str(host.value), str(bug.value), str(damaged.value), result


def test_an_error_of_ours_keeps_its_class_and_message_and_a_bug_its_traceback() -> None:
    (block, host, bug, damaged, result), other = run_ranks(2, _own_errors)
    assert (block, host, damaged, result) == (other[0], other[1], other[3], other[4])
    assert block == "steps=0 must be positive: raise it"
    assert host == "the engine refused"
    assert bug != other[2]
    assert other[2].startswith("the engine failed (rank 0: ZeroDivisionError")
    assert damaged == "it is damaged (rank 0: ValueError: no JSON): remove it"


def _fail(error: Exception) -> None:
    raise error


def _fail_on(condition: bool, error: Exception) -> None:
    if condition:
        raise error


def _wishes(rank: int, world: int) -> list[bool]:
    init_distributed()
    return all_ranks_max(rank == 1, False, True)


def test_a_wish_of_one_rank_is_known_to_all() -> None:
    assert run_ranks(2, _wishes) == [[True, False, True]] * 2
