"""HF -> Megatron -> HF with real GPTModel shards on real gloo ranks, and transformers' logits in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

from opd_megatron.types import Batch
from opd_megatron.weight_sync.gathered import export_weights
from opd_megatron.weights.hf_reader import load_hf_config
from opd_megatron.weights.load import load_weights
from tests.ranks import run_ranks
from tests.weights.checkpoints import PADDED_VOCAB, SIZES, is_moe, write_checkpoint
from tests.weights.live_bytes import LiveBytes

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2)]  # TP, PP, EP
BUCKET_BYTES = 40_000


def _load(folder: Path, tp: int, pp: int, ep: int = 1, dtype: str = "fp32"):
    from opd_megatron.mcore.cpu.platform import init_platform
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.model import build_gpt_model

    init_platform()
    grid = ParallelGrid.build(tp, pp, ep, ep_size=ep)
    config = load_hf_config(folder)
    padded_vocab = max(PADDED_VOCAB, config.vocab_size)
    layout = grid.layout(config.num_hidden_layers, padded_vocab)
    model = build_gpt_model(config, grid, padded_vocab=padded_vocab, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # a row that loading forgets shows
    load_weights(model, folder, config, layout)
    model.eval()  # upstream refuses to train experts at TP 2 without sequence parallelism
    return model, config, layout, grid


def _logits_error(model, grid, expected: dict[str, torch.Tensor]) -> float:
    """Largest difference from transformers' logits over all true columns; 0 off the last stage."""
    from opd_megatron.mcore.forward import response_hidden

    tokens, logits = expected["tokens"], expected["logits"]
    batch = Batch(tokens, tokens, torch.ones(tokens.shape))
    hidden = response_hidden(model, grid, [batch])
    if not grid.is_last_stage:
        return 0.0
    shard = hidden[0] @ model.head_weight.T
    shards = [torch.empty_like(shard) for _ in range(grid.tp_size)]
    dist.all_gather(shards, shard.detach().contiguous(), group=grid.groups.tp)
    full = torch.cat(shards, dim=1)
    assert not full[:, logits.shape[-1] :].any(), "padding rows of the head are not zero"
    return (full[:, : logits.shape[-1]] - logits.flatten(0, 1)).abs().max().item()


def _check_all(rank: int, world_size: int, tp: int, pp: int, ep: int, folders: dict[str, Path]) -> dict[str, float]:
    errors = {}
    for name, folder in folders.items():
        model, config, layout, grid = _load(folder, tp, pp, ep)
        errors[name] = _logits_error(model, grid, torch.load(folder / "expected.pt"))
        for bucket_bytes in (BUCKET_BYTES, 1):  # with 1, every tensor is larger than a bucket
            buckets = list(export_weights(model, config, layout, bucket_bytes=bucket_bytes))
            if rank == 0:
                _assert_identical(buckets, load_file(folder / "model.safetensors"), bucket_bytes)
            else:
                assert buckets == []
    return errors


def _assert_identical(buckets, original: dict[str, torch.Tensor], bucket_bytes: int) -> None:
    for bucket in buckets:
        size = sum(tensor.nbytes for _, tensor in bucket)
        assert size <= bucket_bytes or len(bucket) == 1, "only a tensor alone may exceed the limit"
    exported = dict(item for bucket in buckets for item in bucket)
    assert exported.keys() == original.keys()
    assert sum(map(len, buckets)) == len(original), "a tensor came twice"
    for name, tensor in exported.items():
        assert torch.equal(tensor, original[name]), name


@pytest.mark.parametrize(("tp", "pp", "ep"), LAYOUTS)
def test_logits_are_transformers_and_export_is_bit_identical(
    checkpoints: dict[str, Path], tp: int, pp: int, ep: int
) -> None:
    folders = {name: folder for name, folder in checkpoints.items() if ep == 1 or is_moe(name)}
    for errors in run_ranks(tp * pp * ep, _check_all, tp, pp, ep, folders):
        assert errors.keys() == folders.keys()
        assert all(error <= 1e-4 for error in errors.values()), errors


def _check_bf16(rank: int, world_size: int, folder: Path) -> None:
    model, config, layout, _ = _load(folder, 2, 2, dtype="bf16")
    for dtype in (None, torch.float32):
        exported = [item for bucket in export_weights(model, config, layout, dtype=dtype) for item in bucket]
        original = load_file(folder / "model.safetensors") if rank == 0 else {}
        assert len(exported) == len(original)
        for name, tensor in exported:
            assert tensor.dtype == (dtype or torch.bfloat16)
            assert torch.equal(tensor.bfloat16(), original[name].bfloat16()), name


def test_bf16_models_travel_over_gloo_and_export_in_either_dtype(checkpoints: dict[str, Path]) -> None:
    run_ranks(4, _check_bf16, checkpoints["qwen2_untied"])


def _peak_of_export(rank: int, world_size: int, tp: int, pp: int, folder: Path, bucket_bytes: int) -> int:
    model, config, layout, _ = _load(folder, tp, pp)
    with LiveBytes() as live:
        live.known(model.parameters())
        for _ in export_weights(model, config, layout, bucket_bytes=bucket_bytes):
            pass
    return live.peak


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_export_holds_one_bucket_on_every_rank_however_deep_the_model(tmp_path: Path, tp: int, pp: int) -> None:
    config = LlamaConfig(**(SIZES | {"num_hidden_layers": 10}))
    folder = write_checkpoint(tmp_path / "deep", config)
    limit = 3 * 2 * config.intermediate_size * config.hidden_size * 4  # no parameter has more than a third of it
    assert (folder / "model.safetensors").stat().st_size > 7 * limit
    # The loop above still has one bucket when the next is finished from the shards that arrived: three thirds.
    peaks = run_ranks(tp * pp, _peak_of_export, tp, pp, folder, limit)
    assert max(peaks) <= limit
    assert peaks[0] > limit / 2, "a bucket is used while the next one is on its way"


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_a_tensor_larger_than_a_bucket_is_held_once(tmp_path: Path, tp: int, pp: int) -> None:
    config = LlamaConfig(**(SIZES | {"vocab_size": 4000, "tie_word_embeddings": False}))
    folder = write_checkpoint(tmp_path / "wide", config)
    embedding, rest = 4000 * config.hidden_size * 4, 3 * 2 * config.intermediate_size * config.hidden_size * 4
    assert embedding > 3 * rest
    # What reads the buckets above lets go of one only when it has the next.
    assert max(run_ranks(tp * pp, _peak_of_export, tp, pp, folder, rest)) <= embedding + rest


def test_an_unsharded_model_is_exported_as_views(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "deep", LlamaConfig(**(SIZES | {"num_hidden_layers": 10})))
    assert run_ranks(1, _peak_of_export, 1, 1, folder, BUCKET_BYTES)[0] <= BUCKET_BYTES


SMOLLM2 = Path(__file__).parents[2] / "runs" / "assets" / "teacher"


def _check_smollm2(rank: int, world_size: int, tp: int, folder: Path, expected: dict[str, torch.Tensor]) -> float:
    from opd_megatron.mcore.cpu.platform import init_platform
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.model import build_gpt_model

    init_platform()
    grid, config = ParallelGrid.build(tp, 1, 1), load_hf_config(folder)
    padded_vocab = config.vocab_size + 24  # divides by 8 on each of 3 ranks
    layout = grid.layout(config.num_hidden_layers, padded_vocab)
    model = build_gpt_model(config, grid, padded_vocab=padded_vocab, dtype="fp32")
    load_weights(model, folder, config, layout)
    buckets = export_weights(model, config, layout, dtype=torch.bfloat16)
    if rank == 0:
        original = load_file(folder / "model.safetensors")
        exported = {name for bucket in buckets for name, tensor in bucket if torch.equal(tensor, original[name])}
        assert exported == original.keys()
    else:
        assert list(buckets) == []
    return _logits_error(model.eval(), grid, expected)


@pytest.mark.skipif(not (SMOLLM2 / "config.json").is_file(), reason=f"{SMOLLM2} is absent: make demo converts it")
def test_smollm2_has_transformers_logits_at_tp_1_and_3() -> None:
    # In float64: on logits of up to 40, transformers' own rounding in fp32 takes up most of the tolerance.
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float64).eval()
    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    tokens = AutoTokenizer.from_pretrained(SMOLLM2)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = {"tokens": tokens, "logits": model(tokens).logits}
    limit = 5e-6 * float(expected["logits"].abs().max())  # which sums a processor makes first is its own business
    for tp in (1, 3):
        errors = run_ranks(tp, _check_smollm2, tp, SMOLLM2, expected)
        assert all(error <= limit for error in errors), (tp, errors, limit)
