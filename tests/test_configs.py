"""The YAML files that come with the project: they load, and what is not there yet says so."""

from pathlib import Path

import pytest

from opd_megatron.config import load_config
from opd_megatron.errors import NotAvailableError

FOLDER = Path(__file__).parent.parent / "configs"
NAMES = {"demo", "gkd_gsm8k", "opd_gsm8k", "opd_gsm8k_jsd", "gkd_code", "hybrid_ifeval"}
LATER = {
    "opd_gsm8k": "objective.type=on_policy_distill",
    "opd_gsm8k_jsd": "objective.type=jsd",
    "hybrid_ifeval": "objective.lambda_rl=0.5",
}


def test_the_published_names_exist() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} >= NAMES


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_loads_and_runs_or_says_that_it_cannot(path: Path) -> None:
    config = load_config(path)
    if path.stem not in LATER:
        config.require_available()
        return
    with pytest.raises(NotAvailableError) as error:
        config.require_available()
    message = str(error.value)
    assert message.startswith(f"{LATER[path.stem]} is not available yet")
    assert "\n" not in message


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_says_what_it_does_how_to_run_it_and_on_what(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"opd-megatron train configs/{path.name}" in header
    assert "Hardware:" in header


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_writes_to_a_run_directory_of_its_own(path: Path) -> None:
    assert load_config(path).output_dir == f"runs/{path.stem}"
