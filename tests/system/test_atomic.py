"""Folders and files are there whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from opd_megatron.errors import WeightsError
from opd_megatron.system import atomic


def _content(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def test_a_folder_appears_at_the_end_of_the_block_and_nothing_else_stays(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic.new_folder(out, WeightsError) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert _content(out) == {"a": "1"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("replaces", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, replaces: bool) -> None:
    out = tmp_path / "out"
    if replaces:
        out.mkdir()
        (out / "a").write_text("before")
    with contextlib.suppress(ZeroDivisionError), atomic.new_folder(out, WeightsError, replaces=replaces) as folder:
        (folder / "a").write_text("half")
        _ = 1 // 0
    assert out.exists() == replaces
    assert not replaces or _content(out) == {"a": "before"}
    assert len(list(tmp_path.iterdir())) == replaces


def test_a_killed_writers_leftovers_are_taken_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.partial", ".out.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("x")
    out.mkdir()
    (out / "a").write_text("1")
    with atomic.new_folder(out, WeightsError, replaces=True) as folder:
        assert not _content(folder)
        (folder / "b").write_text("2")
    assert _content(out) == {"b": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_exists_is_refused_unless_it_is_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(WeightsError, match="not an empty folder"), atomic.new_folder(tmp_path / name, WeightsError):
            pass
    with atomic.new_folder(tmp_path / "empty", WeightsError):
        pass


def test_a_refusing_disk_is_an_error_with_the_remedy_of_its_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError) as error, atomic.new_folder(tmp_path / "file" / "out", WeightsError):
        pass
    assert "choose another" in str(error.value)
    assert "disk space" not in str(error.value)
    with pytest.raises(WeightsError) as error, atomic.new_folder(tmp_path / "out", WeightsError):
        raise OSError(28, os.strerror(28))
    assert "free disk space" in str(error.value)


def test_a_file_is_replaced_in_one_move(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    atomic.write_file(path, "one\n")
    atomic.write_file(path, "two\n")
    assert path.read_text() == "two\n"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
