"""The run configuration: what it refuses, what it says, and that nothing is lost on the way to the file."""

import json
from pathlib import Path
from typing import Literal, get_args

import pytest
import yaml
from pydantic import ValidationError

from opd_megatron.command.cli_args import config_keys
from opd_megatron.config import (
    ObjectiveConfig,
    RunConfig,
    Section,
    StudentRanksTeacherConfig,
    TeacherConfig,
    build_config,
    dump_config,
    load_config,
    set_by_path,
)
from opd_megatron.config.loading import first_problem
from opd_megatron.config.teachers import by_placement
from opd_megatron.errors import ConfigError, MissingPathError
from opd_megatron.losses.divergences import DIVERGENCES
from opd_megatron.losses.objectives import KEYS, OBJECTIVES


def refusal(*overrides: str) -> str:
    """The message with which the defaults plus `overrides` are refused; always one line."""
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_defaults_are_valid() -> None:
    assert build_config({}) == RunConfig()


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("optimzer.lr=1", "'optimizer'"),
        ("optimizer.learning_rate=1", "known keys: lr, min_lr"),
        ("rollout.max_new_token=5", "'max_new_tokens'"),
        ("teachers.0.pth=x", "'path'"),
    ],
)
def test_an_unknown_key_is_refused_with_its_neighbour(override: str, suggestion: str) -> None:
    message = refusal(override)
    assert message.startswith("unknown config key")
    assert suggestion in message


@pytest.mark.parametrize(
    "override",
    [
        "steps=0",
        "optimizer.lr=0",
        "optimizer.beta2=1",
        "objective.beta=1.5",
        "objective.temperature=0",
        "objective.lambda_rl=-1",
        "objective.type=kl",
        "objective.alpha=1",
        "objective.lambda_coef=1.5",
        "objective.kl_coef=-1",
        "objective.kl_coef=inf",
        "objective.temperature=nan",
        "objective.truncation=0",
        "objective.clip_low=2",
        "objective.clip_high=-1",
        "objective.ratio_level=batch",
        "rollout.temperature=0",
        "rollout.top_p=0",
        "parallel.tensor=0",
        "parallel.data=0",
        "student.dtype=fp16",
        "teachers=[]",
        "steps=ten",
    ],
)
def test_a_value_outside_its_range_is_refused_by_name_and_value(override: str) -> None:
    key, _, value = override.partition("=")
    message = refusal(override)
    assert message.startswith(f"{key}=")
    assert value.strip("'\"") in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("parallel.sequence_parallel=true",), ("parallel.sequence_parallel", "parallel.tensor > 1")),
        (("parallel.expert=4", "parallel.data=2"), ("parallel.expert=4", "parallel.data=2")),
        (("steps=5", "optimizer.warmup_steps=5"), ("optimizer.warmup_steps=5", "steps=5")),
        (("optimizer.lr=1e-5", "optimizer.min_lr=1e-4"), ("optimizer.min_lr=0.0001", "optimizer.lr=1e-05")),
        (
            ("rollout.prompts_per_step=6", "parallel.data=4", "parallel.micro_batch_size=1"),
            ("= 6", "data-parallel size 4"),
        ),
        (("parallel.virtual_stages=2",), ("parallel.virtual_stages=2", "parallel.pipeline above 1")),
        (
            ("parallel.pipeline=2", "parallel.stages=[1,2,3]"),
            ("parallel.stages=[1, 2, 3] has 3 entries", "makes 2 parts"),
        ),
        (("parallel.context=2", "parallel.micro_batch_size=4"), ("parallel.context=2", "parallel.micro_batch_size=4")),
        (
            ("parallel.context=2", "parallel.tokens_per_micro_batch=100"),
            ("parallel.tokens_per_micro_batch=100 * parallel.context=2", "= 768 tokens"),
        ),
        (("parallel.context=2", "parallel.expert=4", "parallel.data=1"), ("parallel.expert=4", "parallel.context=2")),
        (
            ("parallel.context=2", "teachers.0.path=t", "teachers.0.prompt='{prompt} {answer}'"),
            ("teachers.0.prompt", "parallel.context=2"),
        ),
        (("parallel.micro_batch_size=3",), ("= 8", "micro_batch_size 3")),
        (
            ("objective.type=on_policy_distill", "rollout.temperature=0.7"),
            ("objective.temperature=1.0", "rollout.temperature=0.7", "objective.type=on_policy_distill"),
        ),
        (
            ("objective.type=jsd", "objective.temperature=2"),
            ("objective.temperature=2.0", "rollout.temperature=1.0", "objective.type=jsd"),
        ),
        (
            ("objective.type=jsd", "objective.clip_low=0.2", "objective.truncation="),
            ("objective.clip_low=0.2", "objective.clip_high=None"),
        ),
        (
            ("objective.type=jsd", "objective.clip_high=0.2", "objective.truncation="),
            ("objective.clip_low=None", "objective.clip_high=0.2"),
        ),
        (
            ("objective.type=jsd", "objective.clip_low=0.2", "objective.clip_high=0.3"),
            ("objective.clip_low=0.2", "objective.truncation=2.0", "objective.truncation=null"),
        ),
        (("objective.lambda_distill=0",), ("objective.lambda_distill=0", "objective.lambda_rl=0")),
    ],
)
def test_rules_across_fields_name_every_value_they_concern(overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    message = refusal(*overrides)
    assert all(word in message for word in words), message


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\noptimizer: {lr: 1.0e-3, beta1: 0.5}\n")
    config = load_config(path, ["optimizer.lr=5e-5"])
    assert (config.steps, config.optimizer.lr, config.optimizer.beta1) == (7, 5e-5, 0.5)


def test_a_list_element_is_addressed_by_its_index() -> None:
    config = load_config(None, ["teachers.0.path=a", "teachers.1.path=b", "teachers.1.weight=2"])
    assert [(teacher.path, teacher.weight) for teacher in config.teachers] == [("a", 1.0), ("b", 2.0)]


@pytest.mark.parametrize("override", ["teachers.1.path=a", "steps.x=1", "=1", "steps"])
def test_an_override_that_leads_nowhere_is_refused(override: str) -> None:
    overrides = ["steps=1", override] if override.startswith("steps.") else [override]
    assert "override" in refusal(*overrides)


def test_set_by_path_makes_what_is_missing() -> None:
    tree: dict[str, object] = {"a": None}
    set_by_path(tree, "a.b.0.c", 1)
    assert tree == {"a": {"b": [{"c": 1}]}}


def test_an_empty_value_is_null() -> None:
    assert load_config(None, ["data.answer_column="]).data.answer_column is None


def test_dumping_and_loading_gives_the_same_configuration(tmp_path: Path) -> None:
    config = load_config(None, ["teachers.0.path=x", "parallel.tensor=2", "optimizer.lr=3e-7", "data.limit=5"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_assignment_is_checked_as_well() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        RunConfig().optimizer.lr = -1.0


def test_a_file_that_does_not_exist_is_named() -> None:
    with pytest.raises(MissingPathError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just text"])
def test_a_file_that_holds_no_mapping_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as error:
        load_config(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 4096),
        (["rollout.max_new_tokens=8000"], 8512),
        (["parallel.context=2"], 8192),
        (["rollout.max_new_tokens=16001", "parallel.context=4"], 16520),
        (["parallel.tokens_per_micro_batch=1000", "parallel.context=2"], 2000),
        (["parallel.micro_batch_size=4"], None),
    ],
)
def test_sequences_are_packed_unless_micro_batches_are_asked_for(words: list[str], expected: int | None) -> None:
    assert load_config(None, words).pack_tokens == expected


def test_every_type_of_objective_can_be_trained() -> None:
    types = get_args(ObjectiveConfig.model_fields["type"].annotation)
    sampled = {name for name in types if ObjectiveConfig(type=name).is_sampled}
    assert sampled == {"on_policy_distill", "jsd"}
    exact = set(types) - sampled - {"sft", "eopd"}
    assert exact == set(DIVERGENCES), "every divergence of the loss engine has its name here"
    for name in types:
        load_config(None, [f"objective.type={name}"])


@pytest.mark.parametrize(
    ("type", "key"), [(name, key) for name, entry in OBJECTIVES.items() for key in KEYS if key not in entry.keys]
)
def test_a_key_that_the_type_does_not_use_is_refused_even_at_its_default(type: str, key: str, tmp_path: Path) -> None:
    written = json.dumps(KEYS[key].default)
    path = tmp_path / "run.yaml"
    path.write_text(f"objective: {{type: {type}, {key}: {written}}}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    message = str(error.value)
    assert message == refusal(f"objective.type={type}", f"objective.{key}={written}")
    assert message.startswith(f"objective.{key}=")
    assert f"has no effect with objective.type={type}" in message
    users = [name for name, entry in OBJECTIVES.items() if key in entry.keys]
    assert all(name in message for name in users)


def test_of_two_keys_of_which_one_replaces_the_other_both_are_named() -> None:
    message = refusal("objective.type=jsd", "objective.beta=0.3", "objective.lambda_coef=0.5")
    assert "objective.beta=0.3 has no effect beside objective.lambda_coef=0.5" in message


@pytest.mark.parametrize("type", OBJECTIVES)
def test_what_is_dumped_has_the_keys_of_its_type_and_loads_again(type: str, tmp_path: Path) -> None:
    config = load_config(None, [f"objective.type={type}"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    written = yaml.safe_load(path.read_text())["objective"]
    assert KEYS.keys() & written.keys() == set(OBJECTIVES[type].keys)
    assert load_config(path) == config
    clipped = ["objective.truncation=", "objective.clip_low=0.1", "objective.clip_high=0.2"]
    if "truncation" in OBJECTIVES[type].keys:
        path.write_text(dump_config(load_config(path, clipped)))
        assert load_config(path).objective == load_config(None, [f"objective.type={type}", *clipped]).objective


def test_a_reward_term_brings_its_keys_to_every_type() -> None:
    objective = load_config(None, ["objective.lambda_rl=0.1", "objective.ratio_level=sequence"]).objective
    assert objective.is_sampled
    assert "ratio_level" in objective.model_dump()
    assert "kl_coef" not in objective.model_dump()


def test_a_renamed_key_is_refused_with_its_new_name() -> None:
    message = refusal("rollout.start_timeout=5")
    assert "'rollout.start_timeout'" in message
    assert "'rollout.request_timeout'" in message


def test_a_placement_selects_the_keys_of_a_teacher() -> None:
    class Elsewhere(TeacherConfig):
        placement: Literal["elsewhere"] = "elsewhere"
        url: str = "u"

    class Run(Section):
        teachers: list[by_placement(StudentRanksTeacherConfig, Elsewhere)]  # type: ignore[valid-type]

    run = Run.model_validate({"teachers": [{"path": "a"}, {"path": "b", "placement": "elsewhere", "url": "x"}]})
    assert [type(teacher) for teacher in run.teachers] == [StudentRanksTeacherConfig, Elsewhere]
    assert {name for name, *_ in config_keys(Run)} == {
        "teachers.0.path", "teachers.0.weight", "teachers.0.placement", "teachers.0.dtype", "teachers.0.offload",
        "teachers.0.tensor", "teachers.0.pipeline", "teachers.0.url", "teachers.0.name", "teachers.0.prompt",
        "teachers.0.fingerprint", "teachers.0.alignment", "teachers.0.update", "teachers.0.decay",
        "teachers.0.precision.fp8", "teachers.0.precision.recipe", "teachers.0.precision.first_last_bf16",
        "teachers.0.precision.param",
    }  # fmt: skip
    for entry, message in (
        (
            {"path": "a", "url": "x"},
            "unknown config key 'teachers.0.url': known keys: name, path, weight, prompt, alignment, fingerprint, "
            "dtype, placement, tensor, pipeline, offload, update, decay, precision",
        ),
        ({"path": "a", "placement": "elsewhere", "ur": "x"}, "unknown config key 'teachers.0.ur': did you mean 'url'?"),
        ({"path": "a", "placement": "nowhere"}, "teachers.0.placement='nowhere' is not one: use student or elsewhere"),
    ):
        with pytest.raises(ValidationError) as error:
            Run.model_validate({"teachers": [entry]})
        assert first_problem(error.value, Run) == message


def test_the_loss_may_have_another_temperature_than_sampling_where_the_vocabulary_is_whole() -> None:
    config = load_config(None, ["objective.temperature=2", "rollout.temperature=0.7"])
    assert (config.objective.temperature, config.rollout.temperature) == (2.0, 0.7)


def test_every_key_has_a_meaning_and_a_default_that_loads() -> None:
    listed = list(config_keys())
    assert all(meaning for *_, meaning in listed)
    assert all(meaning.endswith(".") for *_, meaning in listed)
    of_some_types = {f"objective.{key}" for key in KEYS}
    assert of_some_types <= {key for key, *_ in listed}
    defaults = {
        key: yaml.safe_load(default)
        for key, _, default, _ in listed
        if default != "required" and key not in of_some_types and not key.startswith("data.sources.")
    }
    of_own_ranks = {f"teachers.0.{name}" for name in ("data", "expert", "in_flight")}
    assert of_own_ranks <= defaults.keys()
    served = {f"teachers.0.{name}" for name in ("top_k", "api_key_env", "request_timeout", "retries")}
    assert served <= defaults.keys()
    cached = {"teachers.0.missing", "teachers.0.offload"}
    assert cached <= defaults.keys()
    of_places = of_own_ranks | served | {"teachers.0.missing"}
    anywhere = {key: value for key, value in defaults.items() if key not in of_places}
    config = load_config(None, ["teachers.0.path=t", *(f"{key}={yaml.safe_dump(v)}" for key, v in anywhere.items())])
    assert config == load_config(None, ["teachers.0.path=t"])
    own = ["teachers.0.path=t", "teachers.0.placement=own"]
    set_too = [f"{key}={yaml.safe_dump(defaults[key])}" for key in sorted(of_own_ranks)]
    assert load_config(None, [*own, *set_too]) == load_config(None, own)
    there = ["teachers.0.path=t", "teachers.0.placement=served", "teachers.0.urls=[http://a]"]
    set_too = [f"{key}={yaml.safe_dump(defaults[key])}" for key in sorted(served)]
    on_disk = ["teachers.0.path=t", "teachers.0.placement=cached", "teachers.0.cache=c"]
    of_disk = [f"{key}={yaml.safe_dump(defaults[key])}" for key in sorted(cached)]
    assert load_config(None, [*on_disk, *of_disk]) == load_config(None, on_disk)
    assert load_config(None, [*there, *set_too]) == load_config(None, there)


@pytest.mark.parametrize(("written", "meant"), [("off", "off"), ("auto", "auto"), ("false", "off"), ("on", "on")])
def test_transformer_engine_is_switched_off_as_it_is_written(written: str, meant: str) -> None:
    """YAML reads `off` as false."""
    config = load_config(None, [f"student.transformer_engine={written}"])
    assert config.student.transformer_engine == meant


def test_a_pack_holds_the_longest_sequence_and_no_number_of_sequences() -> None:
    too_small = refusal(
        "parallel.tokens_per_micro_batch=600", "data.max_prompt_tokens=512", "rollout.max_new_tokens=100"
    )
    assert "parallel.tokens_per_micro_batch=600 must hold the longest sequence" in too_small
    assert "512 + rollout.max_new_tokens 100 = 612 tokens" in too_small
    both = refusal("parallel.tokens_per_micro_batch=4096", "parallel.micro_batch_size=2")
    assert "parallel.micro_batch_size=2 has no effect with parallel.tokens_per_micro_batch=4096" in both


def test_packs_need_no_number_of_sequences_that_divides() -> None:
    words = ["rollout.prompts_per_step=7", "parallel.data=2"]
    assert "must be a multiple of data-parallel size 2" in refusal(*words, "parallel.micro_batch_size=1")
    load_config(None, words)
