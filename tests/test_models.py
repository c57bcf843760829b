"""Rules of the layout are checked by arithmetic, before a process group exists, each with a remedy in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config import RunConfig, load_config
from opd_megatron.errors import ConfigError, MissingPathError, OPDError
from opd_megatron.run.checks import check_run
from tests.ranks import as_launched
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("layout")
    return (
        save_tiny(root / "student", vocab_size=250),
        save_tiny(root / "teacher", vocab_size=272, num_hidden_layers=6),
    )


def _config(pair: tuple[Path, Path], **values: Any) -> RunConfig:
    settings = {
        "student.path": pair[0],
        "teachers.0.path": pair[1],
        "data.max_prompt_tokens": 100,
        "rollout.max_new_tokens": 50,
        **values,
    }
    return load_config(None, [f"{key}={value}" for key, value in settings.items()])


def test_a_fitting_layout_resolves_both_models(pair: tuple[Path, Path]) -> None:
    models = check_run(_config(pair, **{"parallel.tensor": 2, "parallel.pipeline": 2}))
    assert models.data_parallel == 1
    assert models.vocab_size == 250, "columns that only one model has are padding"
    assert models.padded_vocab(2) == 272


@pytest.mark.parametrize(
    ("values", "error", "parts"),
    [
        ({"parallel.tensor": 3}, ConfigError, ["parallel.tensor=3", "4 attention heads", "[1, 2]"]),
        ({"parallel.tensor": 4}, ConfigError, ["parallel.tensor=4", "2 key-value heads", "student"]),
        ({"parallel.pipeline": 5}, ConfigError, ["parallel.pipeline=5", "4 layers", "student"]),
        ({"parallel.pipeline": 2, "parallel.stages": "[1,2]"}, ConfigError, ["stages=[1, 2] add up to 3", "has 4"]),
        (
            {"parallel.pipeline": 2, "parallel.virtual_stages": 3},
            ConfigError,
            ["parallel.virtual_stages=3 * parallel.pipeline=2", "4 layers"],
        ),
        ({"rollout.max_new_tokens": 500}, ConfigError, ["max_new_tokens 500", "512"]),
        ({"student.path": "/nowhere/model"}, MissingPathError, ["/nowhere/model"]),
        ({"objective.lambda_rl": 0.5}, ConfigError, ["objective.lambda_rl=0.5", "rewards.task"]),
    ],
)
def test_a_broken_rule_is_one_line_with_value_and_remedy(
    pair: tuple[Path, Path], values: dict[str, Any], error: type[OPDError], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        check_run(_config(pair, **values))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("experts") / "model", "qwen2_moe")


@pytest.mark.parametrize("dense", ["student.path", "teachers.0.path", None])
def test_a_model_of_experts_on_either_side_may_be_split_over_expert_parallel_ranks(
    pair: tuple[Path, Path], experts: Path, dense: str | None
) -> None:
    paths = {"student.path": experts, "teachers.0.path": experts} | ({dense: pair[0]} if dense else {})
    config = _config(pair, **{"parallel.expert": 4, **paths})
    assert config.world_size == 4
    assert check_run(config).data_parallel == 4


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"parallel.expert": 3, "parallel.data": 3}, ["parallel.expert=3", "4 experts", "student", "[1, 2, 4]"]),
        ({"parallel.expert": 4, "parallel.data": 2}, ["parallel.expert=4", "parallel.data=2"]),
        ({"parallel.tensor": 2}, ["parallel.sequence_parallel=false", "parallel.tensor=2"]),
        (
            {"parallel.tensor": 4, "parallel.sequence_parallel": True},
            ["parallel.tensor=4", "2 key-value heads of student", "[1, 2]"],
        ),
    ],
)
def test_rules_of_experts(pair: tuple[Path, Path], experts: Path, values: dict[str, Any], parts: list[str]) -> None:
    settings = {"rollout.prompts_per_step": 12, "rollout.samples_per_prompt": 1, "student.path": experts}
    with pytest.raises(ConfigError) as caught:
        check_run(_config(pair, **settings, **values))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_expert_parallel_needs_experts_and_ranks_to_hold_them(
    pair: tuple[Path, Path], experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"parallel.expert=2 needs a MoE model"):
        check_run(_config(pair, **{"parallel.expert": 2}))
    as_launched(monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"parallel.expert=2 must divide data-parallel size 1"):
        check_run(_config(pair, **{"parallel.expert": 2, "student.path": experts}))


def test_world_size_that_does_not_match_names_both_numbers(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_launched(monkeypatch, 3)
    with pytest.raises(ConfigError, match=r"world size 3 must be a multiple of parallel.tensor 2"):
        check_run(_config(pair, **{"parallel.tensor": 2}))
    as_launched(monkeypatch, 4)
    assert check_run(_config(pair, **{"parallel.tensor": 2})).data_parallel == 2
    with pytest.raises(ConfigError, match=r"world size 4 must equal .*parallel.data 1"):
        check_run(_config(pair, **{"parallel.tensor": 2, "parallel.data": 1}))
