"""Conversions leave the GPUs of a machine to whoever trains on them."""

from __future__ import annotations

import os

import pytest

from opd_megatron.convert import convert_command


@pytest.mark.parametrize("what", list(convert_command.COMMANDS))
@pytest.mark.parametrize("as_script", [True, False])
def test_a_conversion_sees_no_gpu(what: str, as_script: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def command(words: list[str], prog: str) -> int:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return 0

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setitem(convert_command.COMMANDS, what, (command, ""))
    code = convert_command.main(what, ["--x"]) if as_script else convert_command.dispatch([what, "--x"])
    assert (code, seen) == (0, [""])
