"""HF -> Megatron -> HF through files, bit by bit, at every layout and from each to another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto import AutoModelForCausalLM

from opd_megatron.convert.hf_megatron import ParallelSizes, hf_to_megatron, megatron_to_hf
from opd_megatron.convert.verify import different_tensors, pairs
from tests.ranks import run_ranks
from tests.weights.checkpoints import CONFIGS, SIZES, is_moe, write_checkpoint

LAYOUTS = [ParallelSizes(1, 1), ParallelSizes(2, 1), ParallelSizes(1, 2), ParallelSizes(2, 2)]
OF_EXPERTS = [ParallelSizes(1, 1, 2), ParallelSizes(1, 2, 2), ParallelSizes(2, 1, 2)]


def _convert(rank: int, world_size: int, sizes: ParallelSizes, jobs: list[tuple[Path, Path]], back: bool) -> None:
    for source, out in jobs:
        (megatron_to_hf if back else hf_to_megatron)(source, out, sizes)


@pytest.fixture(scope="module")
def sources(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family, and in the types that hubs serve; with a tokenizer file to carry along."""
    root = tmp_path_factory.mktemp("sources")
    found = {}
    for name, folder in checkpoints.items():
        found[name] = root / name
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(found[name], max_shard_size="60KB")
        (found[name] / "tokenizer.json").write_text("{}")
    for dtype in (torch.bfloat16, torch.float16):
        name = f"qwen2_untied_{dtype}".replace("torch.", "")
        model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen2_untied"], dtype=dtype)
        model.save_pretrained(root / name)
        found[name] = root / name
    return found


@pytest.fixture(scope="module")
def megatron(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[ParallelSizes, Path]:
    """Folders of Megatron checkpoints, one for each layout that wrote them."""
    found = {}
    for sizes in LAYOUTS + OF_EXPERTS:
        found[sizes] = tmp_path_factory.mktemp("megatron")
        jobs = [(source, found[sizes] / name) for name, source in sources.items() if _splits(name, sizes)]
        run_ranks(sizes.ranks, _convert, sizes, jobs, False)
    return found


def _splits(name: str, sizes: ParallelSizes) -> bool:
    return sizes.expert == 1 or is_moe(name)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("saved_at", "exported_at"),
    [
        *pairs(LAYOUTS), (LAYOUTS[1], LAYOUTS[2]),
        *pairs(OF_EXPERTS), (LAYOUTS[1], OF_EXPERTS[0]), (OF_EXPERTS[2], LAYOUTS[3]),
    ],
    ids=str,
)  # fmt: skip
def test_every_tensor_comes_back_bit_by_bit(
    sources: dict[str, Path],
    megatron: dict[ParallelSizes, Path],
    saved_at: ParallelSizes,
    exported_at: ParallelSizes,
    tmp_path: Path,
) -> None:
    names = [name for name in sources if _splits(name, saved_at) and _splits(name, exported_at)]
    jobs = [(megatron[saved_at] / name, tmp_path / name) for name in names]
    run_ranks(exported_at.ranks, _convert, exported_at, jobs, True)
    for name in names:
        source = sources[name]
        before, after = _tensors(source), _tensors(tmp_path / name)
        assert after.keys() == before.keys(), name
        for key, tensor in before.items():
            assert after[key].dtype == tensor.dtype, (name, key)
            assert torch.equal(after[key], tensor), (name, key)
        assert (tmp_path / name / "config.json").read_bytes() == (source / "config.json").read_bytes()
        if name in CONFIGS:
            assert (tmp_path / name / "tokenizer.json").read_text() == "{}"


def test_transformers_computes_the_same_logits_from_what_comes_back(
    checkpoints: dict[str, Path], megatron: dict[ParallelSizes, Path], tmp_path: Path
) -> None:
    for name in CONFIGS:
        run_ranks(1, _convert, LAYOUTS[0], [(megatron[LAYOUTS[3]] / name, tmp_path / name)], True)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        expected = torch.load(checkpoints[name] / "expected.pt")
        with torch.no_grad():
            assert torch.equal(model(expected["tokens"]).logits, expected["logits"]), name


def test_the_files_say_where_they_come_from(megatron: dict[ParallelSizes, Path], tmp_path: Path) -> None:
    run_ranks(1, _convert, LAYOUTS[0], [(megatron[LAYOUTS[1]] / "llama_tied", tmp_path / "hf")], True)
    told = json.loads((tmp_path / "hf" / "conversion.json").read_text())
    assert (told["tool"], told["parent"]["tool"]) == ("megatron_to_hf", "hf_to_megatron")
    assert (told["parent"]["tensor"], told["parent"]["padded_vocab"]) == (2, 144)


def _megatron_reads(rank: int, world_size: int, folder: Path, source: Path) -> None:
    """Megatron's own loader, without anything of ours but the model."""
    from megatron.core import dist_checkpointing

    from opd_megatron.mcore.cpu.platform import init_platform
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.model import build_gpt_model
    from opd_megatron.weights.hf_reader import load_hf_config
    from opd_megatron.weights.load import load_weights

    init_platform()
    grid = ParallelGrid.build(1, 2, 1)
    config = load_hf_config(source)
    models = [build_gpt_model(config, grid, padded_vocab=136, dtype="fp32") for _ in range(2)]
    state = models[0].sharded_state_dict(metadata={"dp_cp_group": grid.groups.dp_cp})
    models[0].load_state_dict(dist_checkpointing.load(state, str(folder)))
    load_weights(models[1], source, config, grid.layout(config.num_hidden_layers, 136))
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other), name


def test_megatron_itself_reads_the_checkpoint_in_another_layout(
    sources: dict[str, Path], megatron: dict[ParallelSizes, Path]
) -> None:
    for name in ("qwen2_untied", "llama_tied"):
        run_ranks(2, _megatron_reads, megatron[LAYOUTS[1]] / name, sources[name])


def _trained_padding(rank: int, world_size: int, source: Path, folder: Path) -> None:
    """Saves a model whose padding rows are not zero, reads it into another padding and exports it."""
    from opd_megatron.mcore.checkpoint.weights_only import load_model, save_model
    from opd_megatron.mcore.cpu.platform import init_platform
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.model import build_gpt_model
    from opd_megatron.weights.hf_reader import load_hf_config
    from opd_megatron.weights.load import load_weights

    init_platform()
    grid, config = ParallelGrid.build(1, 1, 1), load_hf_config(source)
    trained, read = (build_gpt_model(config, grid, padded_vocab=rows, dtype="fp32") for rows in (144, 160))
    load_weights(trained, source, config, grid.layout(config.num_hidden_layers, 144))
    heads = ("embedding.word_embeddings.weight", "output_layer.weight")
    for name in heads:
        trained.get_parameter(name).data[config.vocab_size :] = 7.0
    (folder / "megatron").mkdir()
    save_model(trained, grid, folder / "megatron")
    load_model(read, grid, folder / "megatron", vocab_size=config.vocab_size)
    for name in heads:
        expected = trained.get_parameter(name).data[: config.vocab_size]
        assert torch.equal(read.get_parameter(name)[: config.vocab_size], expected)
        assert not read.get_parameter(name)[config.vocab_size :].any(), "padding of the checkpoint was kept"
    megatron_to_hf(folder / "megatron", folder / "hf", ParallelSizes(), hf_config=source)


def test_padding_that_training_has_moved_is_neither_kept_nor_exported(sources: dict[str, Path], tmp_path: Path) -> None:
    run_ranks(1, _trained_padding, sources["llama_untied"], tmp_path)
    before, after = _tensors(sources["llama_untied"]), _tensors(tmp_path / "hf")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_another_type_is_written_when_asked(sources: dict[str, Path], tmp_path: Path) -> None:
    run_ranks(1, _to_bf16_and_back, sources["llama_tied"], tmp_path)
    before, after = _tensors(sources["llama_tied"]), _tensors(tmp_path / "hf")
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def _to_bf16_and_back(rank: int, world_size: int, source: Path, folder: Path) -> None:
    hf_to_megatron(source, folder / "megatron", LAYOUTS[0], dtype="bf16")
    megatron_to_hf(folder / "megatron", folder / "hf", LAYOUTS[0])


def test_the_comparison_sees_one_bit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = CONFIGS["llama_tied"]
    one = write_checkpoint(tmp_path / "one", config)
    tensors = load_file(one / "model.safetensors")
    (tmp_path / "other").mkdir()
    tensors["model.norm.weight"].view(torch.int32)[SIZES["hidden_size"] - 1] ^= 1
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    assert different_tensors(one, one, list(tensors)) == []
    assert different_tensors(one, tmp_path / "other", list(tensors)) == ["model.norm.weight"]
