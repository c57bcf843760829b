"""A run directory that is not the same one everywhere is found before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron.errors import ConfigError
from opd_megatron.system import shared_folder
from opd_megatron.system.shared_folder import check_shared
from tests.ranks import run_ranks


def _check(rank: int, world_size: int, folders: list[Path]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_folder, "_PATIENCE_SECONDS", 0.3)
        try:
            check_shared(folders[rank], "output_dir='run'")
        except ConfigError as error:
            return str(error)
        except OSError as error:
            return type(error).__name__
    return "shared"


def test_one_folder_is_shared_and_nothing_stays_in_it(tmp_path: Path) -> None:
    assert run_ranks(3, _check, [tmp_path] * 3) == ["shared"] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_one_machine_alone_is_every_ranks_error(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    said = run_ranks(3, _check, [here, here, there])
    assert len(set(said)) == 1
    assert said[0].startswith("output_dir='run' is not one folder for all machines: what rank 0 writes on")
    assert str(here) in said[0]
    assert "rank 2 on" in said[0]
    assert str(there) in said[0]
    assert list(here.iterdir()) == []


def test_a_folder_that_rank_0_cannot_write_to_is_its_own_error(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert run_ranks(2, _check, [missing, missing]) == ["FileNotFoundError", "shared"]
