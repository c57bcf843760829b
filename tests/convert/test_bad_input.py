"""What is wrong with a checkpoint is one line naming file and tensor, and what was there before still is."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from opd_megatron.convert.hf_megatron import ParallelSizes, hf_to_megatron, megatron_to_hf
from opd_megatron.errors import ConfigError, MissingPathError, OPDError, WeightsError
from tests.ranks import RankError, run_ranks
from tests.weights.checkpoints import CONFIGS, write_checkpoint

ONE = ParallelSizes()
TWO = ParallelSizes(tensor=2)


def _convert(rank: int, world_size: int, source: Path, out: Path, back: bool) -> None:
    (megatron_to_hf if back else hf_to_megatron)(source, out, ParallelSizes(tensor=world_size))


def _refused(ranks: int, source: Path, out: Path, *, back: bool) -> str:
    """The message of a conversion that must fail and leave nothing of `out` behind."""
    with pytest.raises(RankError) as stopped:
        run_ranks(ranks, _convert, source, out, back)
    assert isinstance(stopped.value.cause, OPDError), str(stopped.value)
    message = str(stopped.value.cause)
    assert "\n" not in message
    assert not [path for path in out.parent.iterdir() if out.name in path.name], "a failed conversion left files"
    return message


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hf"), CONFIGS["llama_untied"], max_shard_size="60KB")


@pytest.fixture(scope="module")
def megatron(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("megatron") / "saved"
    run_ranks(2, _convert, sharded, out, False)
    return out


def _truncate(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    return f"{file.name}' is damaged or cut short"


def _garble_header(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[10:20] = b"\xff" * 10
    file.write_bytes(content)
    return f"{file.name}' is damaged or cut short"


def _lose_shard(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.unlink()
    return f"names '{file.name}' (for tensor '"


def _rewrite(folder: Path, tensor: str, value: torch.Tensor) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][tensor]
    save_file(load_file(file) | {tensor: value}, file)
    return file


def _wrong_shape(folder: Path) -> str:
    file = _rewrite(folder, "model.norm.weight", torch.ones(47))
    return f"tensor 'model.norm.weight' in '{file}' has shape [47]"


def _wrong_dtype(folder: Path) -> str:
    file = _rewrite(folder, "model.norm.weight", torch.ones(48, dtype=torch.int8))
    return f"tensor 'model.norm.weight' in '{file}' has dtype I8"


def _mixed_dtypes(folder: Path) -> str:
    _rewrite(folder, "model.norm.weight", torch.ones(48, dtype=torch.bfloat16))
    return "need one type, --dtype: model.norm.weight is bf16"


def _other_model(folder: Path) -> str:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 4}))
    return "holds no tensor 'model.layers.2."


@pytest.mark.parametrize(
    "damage", [_truncate, _garble_header, _lose_shard, _wrong_shape, _wrong_dtype, _mixed_dtypes, _other_model]
)
def test_a_bad_hugging_face_folder_is_refused_on_all_ranks(
    sharded: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sharded, source)
    said = damage(source)
    assert said in _refused(2, source, tmp_path / "converted", back=False)


def _cut_shard(folder: Path) -> str:
    file = folder / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-3000])
    return f"' in '{file}' cannot be read: the file was cut short"


def _flip_bit(folder: Path) -> str:
    file = folder / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"' in '{file}' cannot be read: the file is damaged"


def _lose_file(folder: Path) -> str:
    (folder / "__0_0.distcp").unlink()
    return f"'{folder}/__0_0.distcp' (for tensor '"


def _cut_index(folder: Path) -> str:
    file = folder / ".metadata"
    file.write_bytes(file.read_bytes()[:-100])
    return ".metadata' is damaged"


def _no_index(folder: Path) -> str:
    (folder / ".metadata").unlink()
    return "is no Megatron checkpoint: it has no .metadata"


def _other_width(folder: Path) -> str:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))
    return "has tensor 'decoder.layers.mlp.linear_fc1.weight' of shape [2, 160, 48], the config says [2, 192, 48]"


def _other_family(folder: Path) -> str:
    config = folder / "config.json"
    tree = json.loads(config.read_text()) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    config.write_text(json.dumps(tree))
    return "holds no tensor 'decoder.layers.self_attention.linear_qkv.bias'"


def _tied(folder: Path) -> str:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    return "holds 1 tensors (first 'output_layer.weight') with no place"


@pytest.mark.parametrize(
    "damage", [_cut_shard, _flip_bit, _lose_file, _cut_index, _no_index, _other_width, _other_family, _tied]
)
def test_a_bad_megatron_folder_is_refused_on_all_ranks(
    megatron: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(megatron, source)
    said = damage(source)
    assert said in _refused(2, source, tmp_path / "converted", back=True)


@pytest.mark.parametrize("back", [False, True])
def test_a_folder_with_something_in_it_is_never_written_to(
    sharded: Path, megatron: Path, tmp_path: Path, back: bool
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RankError) as stopped:
        run_ranks(2, _convert, megatron if back else sharded, tmp_path, back)
    assert isinstance(stopped.value.cause, WeightsError)
    assert "is not an empty folder" in str(stopped.value.cause)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_sizes_and_places_that_cannot_be_are_refused(sharded: Path, tmp_path: Path) -> None:
    for sizes, said in ((ParallelSizes(3), "--tensor 3 must divide"), (ParallelSizes(1, 3), "--pipeline 3 must")):
        with pytest.raises(ConfigError, match=said):
            hf_to_megatron(sharded, tmp_path / "out", sizes)
    with pytest.raises(MissingPathError, match="does not exist"):
        megatron_to_hf(tmp_path / "nowhere", tmp_path / "out", ONE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingPathError, match="--hf-config"):
        megatron_to_hf(tmp_path / "empty", tmp_path / "out", ONE)


def _with_a_full_disk(rank: int, world_size: int, source: Path, out: Path, back: bool, limit: int) -> str:
    """No file of this process may grow beyond `limit` bytes: what it writes then fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        _convert(rank, world_size, source, out, back)
    except WeightsError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "no error"


@pytest.mark.parametrize("back", [False, True])
def test_a_full_disk_is_one_line_and_leaves_nothing(sharded: Path, megatron: Path, tmp_path: Path, back: bool) -> None:
    source = megatron if back else sharded
    messages = run_ranks(
        2, _with_a_full_disk, source, tmp_path / "out", back, 60_000
    )  # the ranks' own store needs some
    assert messages[0] == messages[1]
    assert "free disk space" in messages[0]
    assert "File too large" in messages[0]
    assert "\n" not in messages[0]
    assert list(tmp_path.iterdir()) == []
    run_ranks(2, _convert, source, tmp_path / "out", back)  # with space again it simply works


@pytest.mark.slow
@pytest.mark.parametrize("back", [False, True])
def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_can_be_run_again(
    sharded: Path, megatron: Path, tmp_path: Path, back: bool
) -> None:
    """Killed by the kernel at the moment it has made the partial folder and writes its first big file."""
    script = "hf-to-megatron" if not back else "megatron-to-hf"
    source = ["--megatron", str(megatron)] if back else ["--hf", str(sharded)]
    command = [sys.executable, "-m", "opd_megatron.cli", "convert", script, *source, "--out", str(tmp_path / "out")]

    def dies_of_a_big_file() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    # Python ignores SIGXFSZ; with the default action the first write beyond the limit ends the process on the spot.
    code = "import runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); "
    code += "sys.argv = sys.argv[1:]; runpy.run_module('opd_megatron.cli', run_name='__main__')"
    killed = subprocess.run(
        [sys.executable, "-c", code, *command[2:]], preexec_fn=dies_of_a_big_file, capture_output=True, check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "NUMBA_DISABLE_JIT": "1"},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    run_ranks(1, _convert, megatron if back else sharded, tmp_path / "out", back)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_splits_a_model_of_experts_is_the_width_of_an_expert() -> None:
    hf = Qwen3MoeConfig(
        num_attention_heads=6, num_key_value_heads=6, intermediate_size=96, moe_intermediate_size=32, num_experts=4,
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="--tensor 3 must divide the model's 32 feed-forward columns of an expert"):
        ParallelSizes(3).check(hf)


def test_expert_parallelism_needs_experts_that_it_divides() -> None:
    with pytest.raises(ConfigError, match="--expert 3 must divide the model's 4 experts: use another size"):
        ParallelSizes(expert=3).check(CONFIGS["qwen3_moe"])
    with pytest.raises(ConfigError, match="--expert 2 needs a MoE model, this one has no experts: leave it out"):
        ParallelSizes(expert=2).check(CONFIGS["llama"])
