from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig

from opd_megatron.errors import WeightsError
from opd_megatron.weight_sync.gathered import export_weights
from opd_megatron.weights.hf_reader import SafetensorsSource
from opd_megatron.weights.layout import ShardLayout
from opd_megatron.weights.load import load_weights
from tests.weights.checkpoints import CONFIGS, write_checkpoint
from tests.weights.modules import llama_shapes, module_of

CONFIG = CONFIGS["llama_untied"]
WHOLE = ShardLayout(padded_vocab=140, first_layer=0, num_layers=2)


def _stand_in(config: PretrainedConfig = CONFIG, layout: ShardLayout = WHOLE, **kwargs: bool) -> nn.Module:
    return module_of(llama_shapes(config, layout, **kwargs))


def test_a_rank_reads_only_the_bytes_it_holds(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = SafetensorsSource.get_slice

    def counting(self, name, slices=()):
        tensor = original(self, name, slices)
        read.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(SafetensorsSource, "get_slice", counting)
    layout = ShardLayout(140, first_layer=1, num_layers=1, tp_rank=1, tp_size=2, pp_rank=1, pp_size=2)
    model = _stand_in(layout=layout)
    load_weights(model, checkpoints["llama_untied"], CONFIG, layout)
    padding = 9 * CONFIG.hidden_size * 4
    assert sum(read) == sum(parameter.nbytes for parameter in model.parameters()) - padding


def test_a_rank_reads_its_own_experts_alone(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = SafetensorsSource.get_slice

    def counting(self, name, slices=()):
        tensor = original(self, name, slices)
        read.append((name, tensor.nbytes))
        return tensor

    monkeypatch.setattr(SafetensorsSource, "get_slice", counting)
    config = CONFIGS["qwen3_moe"]
    layout = ShardLayout(140, first_layer=0, num_layers=2, tp_rank=1, tp_size=2, ep_rank=1, ep_size=2)
    model = _stand_in(config, layout)
    load_weights(model, checkpoints["qwen3_moe"], config, layout)
    experts = {name.split(".experts.")[1].split(".")[0] for name, _ in read if ".experts." in name}
    assert experts == {"2", "3"}
    padding = 2 * 9 * config.hidden_size * 4
    assert sum(size for _, size in read) == sum(parameter.nbytes for parameter in model.parameters()) - padding


@pytest.mark.parametrize("name", ["llama_untied", "qwen3_moe"])
def test_transformer_engine_and_local_names_get_the_same_tensors(checkpoints: dict[str, Path], name: str) -> None:
    exports = []
    for transformer_engine in (False, True):
        model = _stand_in(CONFIGS[name], transformer_engine=transformer_engine)
        load_weights(model, checkpoints[name], CONFIGS[name], WHOLE)
        exports.append(dict(item for bucket in export_weights(model, CONFIGS[name], WHOLE) for item in bucket))
    original = load_file(checkpoints[name] / "model.safetensors")
    for exported in exports:
        assert exported.keys() == original.keys()
        assert all(torch.equal(exported[name], original[name]) for name in original)


def test_the_last_stage_of_a_tied_model_heads_with_the_embedding(checkpoints: dict[str, Path]) -> None:
    config = CONFIGS["llama_tied"]
    layout = ShardLayout(140, first_layer=1, num_layers=1, pp_rank=1, pp_size=2)
    model = _stand_in(config, layout)
    load_weights(model, checkpoints["llama_tied"], config, layout)
    embedding = load_file(checkpoints["llama_tied"] / "model.safetensors")["model.embed_tokens.weight"]
    head = model.get_parameter("output_layer.weight")
    assert torch.equal(head[:131], embedding)
    assert not head[131:].any()


def test_wrappers_are_seen_through_and_dtypes_cast(checkpoints: dict[str, Path]) -> None:
    model = nn.Module()
    model.module = nn.Module()
    model.module.module = module_of(llama_shapes(CONFIG, WHOLE), torch.bfloat16)
    load_weights(model, checkpoints["llama_untied"], CONFIG, WHOLE)
    exported = dict(item for bucket in export_weights(model, CONFIG, WHOLE) for item in bucket)
    for name, tensor in load_file(checkpoints["llama_untied"] / "model.safetensors").items():
        assert torch.equal(exported[name], tensor.bfloat16()), name


def test_an_export_without_gathering_is_made_of_views(checkpoints: dict[str, Path]) -> None:
    model = _stand_in()
    load_weights(model, checkpoints["llama_untied"], CONFIG, WHOLE)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for bucket in export_weights(model, CONFIG, WHOLE):
        for name, tensor in bucket:
            interleaved = any(part in name for part in ("q_proj", "k_proj", "v_proj"))
            assert (tensor.untyped_storage().data_ptr() in storages) is not interleaved, name
            assert tensor.is_contiguous()
            assert not tensor.requires_grad


def test_derived_buffers_and_the_head_of_a_tied_model_are_ignored(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(checkpoints["llama_tied"] / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["model.embed_tokens.weight"], 7.0)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, tmp_path / "model.safetensors")
    config = CONFIGS["llama_tied"]
    model = _stand_in(config)
    load_weights(model, tmp_path, config, WHOLE)
    embedding = model.get_parameter("embedding.word_embeddings.weight")
    assert torch.equal(embedding[:131], tensors["model.embed_tokens.weight"])


def _drop(tensors: dict[str, torch.Tensor]) -> str:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return "no tensor 'model.layers.1.mlp.up_proj.weight'"


def _wrong_shape(tensors: dict[str, torch.Tensor]) -> str:
    tensors["model.norm.weight"] = torch.ones(47)
    return "'model.norm.weight' in .* has shape \\[47\\], config.json says \\[48\\]"


def _more_vocabulary(tensors: dict[str, torch.Tensor]) -> str:
    tensors["model.embed_tokens.weight"] = torch.ones(132, 48)
    return "'model.embed_tokens.weight' in .* has shape \\[132, 48\\], config.json says \\[131, 48\\]"


def _bias(tensors: dict[str, torch.Tensor]) -> str:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)
    return "1 tensors \\(first 'model.layers.0.self_attn.q_proj.bias'\\) with no place"


def _deeper(tensors: dict[str, torch.Tensor]) -> str:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(80, 48)
    return "first 'model.layers.2.mlp.up_proj.weight'"


def _quantized(tensors: dict[str, torch.Tensor]) -> str:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(80, 48, dtype=torch.int8)
    return "'model.layers.0.mlp.up_proj.weight' in .* has dtype I8: quantized"


@pytest.mark.parametrize("damage", [_drop, _wrong_shape, _more_vocabulary, _bias, _deeper, _quantized])
def test_a_checkpoint_that_does_not_fit_is_named(checkpoints: dict[str, Path], tmp_path: Path, damage) -> None:
    tensors = load_file(checkpoints["llama_untied"] / "model.safetensors")
    match = damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    _assert_refused(tmp_path, match)


def _truncate(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    return f"{file.name}' is damaged or cut short"


def _lose_a_file(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.unlink()
    return f"index.json' names '{file.name}' \\(for tensor '.*'\\), which does not exist"


def _misplace(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(folder.glob("*.safetensors"))[0].name
    content["weight_map"]["model.norm.weight"] = first
    index.write_text(json.dumps(content))
    return f"'model.norm.weight' in '.*{first}' cannot be read"


def _garble_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    return "index.json' is not valid JSON"


def _empty_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{}")
    return "index.json' has no weight_map"


def _only_pickles(folder: Path) -> str:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    return "holds no model.safetensors or .*: load it with transformers and save_pretrained it once"


def _nothing(folder: Path) -> str:
    for file in folder.glob("model*"):
        file.unlink()
    return "holds no model.safetensors or .*: give a folder or hub id with safetensors"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("sharded"), CONFIG, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_sharded_and_single_file_checkpoints_load_alike(sharded: Path, checkpoints: dict[str, Path]) -> None:
    models = [_stand_in(), _stand_in()]
    load_weights(models[0], sharded, CONFIG, WHOLE)
    load_weights(models[1], checkpoints["llama_untied"], CONFIG, WHOLE)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "damage", [_truncate, _lose_a_file, _misplace, _garble_index, _empty_index, _only_pickles, _nothing]
)
def test_damaged_files_are_named(sharded: Path, tmp_path: Path, damage) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    _assert_refused(folder, damage(folder))


def _assert_refused(folder: Path, match: str) -> None:
    with pytest.raises(WeightsError, match=match) as error:
        load_weights(_stand_in(), folder, CONFIG, WHOLE)
    assert "\n" not in str(error.value)


def test_a_model_that_the_table_does_not_describe_is_refused(checkpoints: dict[str, Path]) -> None:
    shapes = llama_shapes(CONFIG, WHOLE)
    cases = {
        "without a Hugging Face tensor: \\['decoder.extra'\\]": shapes | {"decoder.extra": (3,)},
        "no parameter 'output_layer.weight'": {k: v for k, v in shapes.items() if k != "output_layer.weight"},
        "'decoder.final_layernorm.weight' has shape \\[49\\], the config says \\[48\\]": shapes
        | {"decoder.final_layernorm.weight": (49,)},
    }
    for match, wrong in cases.items():
        with pytest.raises(WeightsError, match=match):
            load_weights(module_of(wrong), checkpoints["llama_untied"], CONFIG, WHOLE)
