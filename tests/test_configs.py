"""The YAML files that come with the project: they load, fit their hardware, and run."""

from pathlib import Path

import pytest

from opd_megatron.config import load_config
from opd_megatron.tasks import task_named

FOLDER = Path(__file__).parent.parent / "configs"
NAMES = {"demo", "gkd_gsm8k", "opd_gsm8k", "opd_gsm8k_jsd", "gkd_code", "hybrid_ifeval", "qwen2.5_7b_from_72b", "mopd",
    "opsd_gsm8k",
}  # fmt: skip
RANKS = {"qwen2.5_7b_from_72b": 64}


def test_the_published_names_exist() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} >= NAMES


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_loads_and_its_tasks_are_there(path: Path) -> None:
    config = load_config(path)
    config.check_rewards()
    for name in (config.rewards.task, config.evaluation.task, *config.rewards.tasks.values()):
        assert name is None or task_named(name)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_says_what_it_does_how_to_run_it_and_on_what(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"opd-megatron train configs/{path.name}" in header
    assert "Hardware:" in header


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_writes_to_a_run_directory_of_its_own(path: Path) -> None:
    assert load_config(path).output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("name", sorted(NAMES - {"demo"}))
def test_a_config_for_gpus_of_80_gb_passes_the_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from opd_megatron.planning.gpus import gpu_named
    from opd_megatron.planning.run_plan import make_plan

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = load_config(FOLDER / f"{name}.yaml")
    plan = make_plan(config, gpu_named("H100"))
    assert plan.sizes.job_ranks == RANKS.get(name, 8)
    assert plan.fits, f"{plan.peak.peak / 2**30:.1f} GiB on stage {plan.peak.stage}"
    assert all(found.elements > 7e9 for found in plan.coverage.values())
