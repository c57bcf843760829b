"""The YAML files that come with the project: they load, and what is not there yet says so."""

from pathlib import Path

import pytest

from opd_megatron.config import load_config
from opd_megatron.errors import NotAvailableError

FOLDER = Path(__file__).parent.parent / "configs"
GPU_GIB = 78  # what a GPU of 80 GB has
SHAPES = {  # hidden size, layers, heads, key-value heads, feed-forward columns
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944),
    "Qwen/Qwen2.5-Coder-7B-Instruct": (3584, 28, 28, 4, 18944),
    "Qwen/Qwen2.5-Coder-32B-Instruct": (5120, 64, 40, 8, 27648),
    "Qwen/Qwen2.5-72B-Instruct": (8192, 80, 64, 8, 29568),
}
NAMES = {"demo", "gkd_gsm8k", "opd_gsm8k", "opd_gsm8k_jsd", "gkd_code", "hybrid_ifeval"}
LATER = {"hybrid_ifeval": "objective.lambda_rl=0.5"}


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


def save_shape(name: str, folder: Path) -> str:
    """A folder with the config.json of a published model and no weights."""
    from transformers import Qwen2Config

    hidden, layers, heads, groups, columns = SHAPES[name]
    Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        intermediate_size=columns, vocab_size=152064, max_position_embeddings=32768, tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder / name)  # fmt: skip
    return str(folder / name)


@pytest.mark.parametrize("name", sorted(NAMES - {"demo"}))
def test_a_config_for_8_gpus_of_80_gb_fits_them_by_arithmetic(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd_megatron.mcore import layout

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = load_config(FOLDER / f"{name}.yaml")
    student, teacher = (save_shape(model.path, tmp_path) for model in (config.student, config.teachers[0]))
    # Memory and divisibility do not depend on the objective, so a config of a later release is checked as well.
    here = [f"student.path={student}", f"teachers.0.path={teacher}", "objective.lambda_rl=0"]
    config = load_config(FOLDER / f"{name}.yaml", here)
    resolved = layout.check(config)
    assert config.world_size == 8
    for stage in range(config.parallel.pipeline):
        training = sum(layout.stage_memory(config, resolved, stage).values()) / layout.GIB
        # The engine lives on the first rank, which is of stage 0; a tenth is kept for buffers and fragmentation.
        engine = config.rollout.gpu_memory_utilization * GPU_GIB if stage == 0 else 0
        assert training + engine < 0.9 * GPU_GIB, f"stage {stage}: {training:.1f} + {engine:.1f} GiB"
