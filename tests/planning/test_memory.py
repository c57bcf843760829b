"""The memory plan counts what the modules hold, and moves as the layout says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_megatron.config import ParallelConfig, decide_precision, load_config
from opd_megatron.mcore.meta_shards import distinct_shards
from opd_megatron.models.sizes import LayerSizes, RunSizes
from opd_megatron.planning.memory import RankMemory, layer_elements, rank_memory
from opd_megatron.planning.run_plan import describe
from opd_megatron.run.checks import check_run
from opd_megatron.system.processor import BF16_GPU
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("memory")
    return save_tiny(root / "student", vocab_size=250), save_tiny(
        root / "teacher", "qwen2", vocab_size=272, tie_word_embeddings=False
    )


def sizes_of(pair: tuple[Path, Path], **overrides: Any) -> RunSizes:
    values = {
        "student.path": pair[0], "teachers.0.path": pair[1], "data.max_prompt_tokens": 64,
        "rollout.max_new_tokens": 32, "parallel.micro_batch_size": 2, **overrides,
    }  # fmt: skip
    config, _ = decide_precision(
        load_config(None, [f"{key.replace('__', '.')}={value}" for key, value in values.items()]), machine=BF16_GPU
    )
    return RunSizes(config, check_run(config))


def memory_of(pair: tuple[Path, Path], stage: int = 0, **overrides: Any) -> RankMemory:
    return rank_memory(sizes_of(pair, **overrides), stage, gpu=True)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_parameters_are_those_of_the_built_modules(pair: tuple[Path, Path], tensor: int, pipeline: int) -> None:
    sizes = sizes_of(pair, parallel__tensor=tensor, parallel__pipeline=pipeline)
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    for hf in sizes.models.configs:
        for module, layout in distinct_shards(hf, parallel, 1, sizes.models.padded_vocab(tensor)):
            held = sum(parameter.numel() for parameter in module.parameters())
            assert sizes.stage(hf, layout.pp_rank).parameters == held


def _kept_by_a_layer(rank: int, world: int, folder: Path, dtype: str, batch: int, length: int) -> float:
    """Bytes that autograd keeps of one layer more, storages counted once, parameters left out."""
    from opd_megatron.mcore.cpu.platform import init_distributed
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.model import build_gpt_model
    from opd_megatron.weights.hf_reader import load_hf_config

    init_distributed()
    grid = ParallelGrid.build(world, 1, 1)
    totals = []
    for layers in (1, 2):
        hf = load_hf_config(folder)
        hf.num_hidden_layers = layers
        model = build_gpt_model(hf, grid, padded_vocab=272, dtype=dtype)  # type: ignore[arg-type]
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = torch.zeros(batch, length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=tokens, position_ids=torch.arange(length).expand_as(tokens), attention_mask=None)
        totals.append(sum(kept.values()))
    return totals[1] - totals[0]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_layer_keeps_what_the_formula_counts(pair: tuple[Path, Path], tensor: int, dtype: str) -> None:
    batch, length, bytes_per_element = 4, 64, 2 if dtype == "bf16" else 4
    layer = LayerSizes.of(sizes_of(pair).models.student_config)
    # The attention's own output is kept by its function, where autograd's hooks do not look.
    hidden_from_hooks = layer.query / tensor
    small = 4 * layer.head_dim * bytes_per_element / batch + 8
    expected = batch * length * ((layer_elements(layer, tensor, 1) - hidden_from_hooks) * bytes_per_element + small)
    for kept in run_ranks(tensor, _kept_by_a_layer, pair[0], dtype, batch, length):
        assert kept == pytest.approx(expected, rel=0.02)


def test_each_axis_divides_what_it_shards(pair: tuple[Path, Path]) -> None:
    alone = memory_of(pair).parts
    tensor = memory_of(pair, parallel__tensor=2, parallel__sequence_parallel="true").parts
    data = memory_of(pair, parallel__data=2).parts
    assert tensor["gradients"] == pytest.approx(alone["gradients"] / 2, rel=0.05)
    assert alone["activations"] / 2 <= tensor["activations"] < 0.6 * alone["activations"]
    assert data["optimizer"] == alone["optimizer"] / 2
    assert data["weights"] == alone["weights"]


def test_recomputation_keeps_a_layers_input_alone(pair: tuple[Path, Path]) -> None:
    whole, recomputed = (memory_of(pair, student__recompute=value).parts["activations"] for value in ("false", "true"))
    assert recomputed < whole / 2


def test_earlier_stages_keep_more_micro_batches(pair: tuple[Path, Path]) -> None:
    overrides = {"parallel__pipeline": 2, "rollout__prompts_per_step": 8}
    first, last = (memory_of(pair, stage, **overrides).parts for stage in range(2))
    assert first["activations"] > 1.5 * last["activations"]
    assert first["teacher states"] == 0 < last["teacher states"]
    assert first["loss chunks"] == 0 < last["loss chunks"]
    one = memory_of(pair, parallel__pipeline=2, rollout__prompts_per_step=2).parts
    assert one["activations"] < first["activations"], "there is only one micro batch to keep"


def test_an_engine_takes_its_share_of_every_gpu_in_turns_with_the_student(pair: tuple[Path, Path]) -> None:
    sizes = sizes_of(pair, parallel__pipeline=2, rollout__gpu_memory_utilization=0.25)
    for stage in range(2):
        for device in (1e6, 1e12):  # the student's step needs more, and the engine does
            memory = rank_memory(sizes, stage, gpu=True, device_bytes=device)
            assert memory.engine == 0.25 * device
            assert 0 < memory.resident < memory.total
            assert memory.peak == max(memory.total, memory.resident + memory.engine)


def test_an_engine_that_stays_awake_is_added_and_one_elsewhere_is_not(pair: tuple[Path, Path]) -> None:
    for changed in ({"rollout__sleep": False}, {"rollout__steps_ahead": 1}):
        awake = rank_memory(sizes_of(pair, **changed), 0, gpu=True, device_bytes=1e9)
        assert awake.peak == awake.total + awake.engine > awake.total
    apart = sizes_of(pair, rollout__placement="own", rollout__hosts=1)
    assert rank_memory(apart, 0, gpu=True, device_bytes=1e9).engine == 0


def test_dry_run_text_accounts_for_every_stage(pair: tuple[Path, Path]) -> None:
    sizes = sizes_of(pair, parallel__tensor=2, parallel__pipeline=2, parallel__data=2)
    text = describe(sizes.config, sizes.models)
    assert "8 = tensor 2 x pipeline 2 x data 2" in text
    assert "stage 0" in text
    assert "stage 1" in text


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_a_real_run_holds_what_is_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import memory_plan

    memory_plan.make_models(tmp_path)
    run = memory_plan.Run(dtype="fp32")  # in bf16 a machine without such units takes minutes for it
    (peak,), (plan,) = memory_plan.measured(run, tmp_path), memory_plan.planned(run, tmp_path)
    assert plan.total == pytest.approx(peak, rel=0.15)
