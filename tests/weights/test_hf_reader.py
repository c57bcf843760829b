from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_megatron.errors import MissingPathError, UnsupportedModelError, WeightsError
from opd_megatron.weights.hf_reader import load_hf_config, resolve_model


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network and an empty hub cache; returns the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_model_folder_resolves_to_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_an_id_in_the_hub_cache_resolves_offline(offline: Path) -> None:
    repo = offline / "models--some--model"
    snapshot = repo / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    assert resolve_model("some/model") == snapshot


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("./no/such/folder", "'./no/such/folder' does not exist: give a"),
        ("/no/such/folder", "'/no/such/folder' does not exist"),
        ("some/unknown-model", "'some/unknown-model' is neither a folder nor a hub id .* HF_HUB_OFFLINE"),
        ("unknown", "'unknown' is neither a folder nor a hub id"),
    ],
)
def test_a_missing_model_is_named_with_a_remedy(offline: Path, path: str, match: str) -> None:
    with pytest.raises(MissingPathError, match=match) as error:
        resolve_model(path)
    assert "\n" not in str(error.value)


def test_a_folder_without_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(MissingPathError, match=r"config.json' does not exist"):
        load_hf_config(tmp_path)


def test_unreadable_configs_are_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(WeightsError, match=r"config.json' is not valid JSON"):
        load_hf_config(tmp_path)
    file.write_text("[]")
    with pytest.raises(WeightsError, match="must hold a JSON object, got list"):
        load_hf_config(tmp_path)
    file.write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(UnsupportedModelError, match="unknown model_type='no-such-type'"):
        load_hf_config(tmp_path)


def test_code_that_came_with_a_model_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    auto_map = {"AutoConfig": "configuration_evil.EvilConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "configuration_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(UnsupportedModelError):
        load_hf_config(tmp_path)
    assert not marker.exists()
