"""From the configuration to an engine, without starting one."""

import importlib.util

import pytest
import torch

from opd_megatron.config import build_config
from opd_megatron.errors import RolloutError
from opd_megatron.rollout import build_engine
from opd_megatron.rollout.torch_engine import TorchEngine
from opd_megatron.rollout.vllm_engine import VLLMOptions


def run_config(**rollout):
    return build_config({"teachers": [{"path": "t"}], "rollout": {"dtype": "fp32", **rollout}, "seed": 3})


def test_the_torch_engine_is_built_on_request(tmp_path):
    assert isinstance(build_engine(run_config(engine="torch"), tmp_path, 32, tmp_path / "log"), TorchEngine)


def test_a_missing_vllm_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RolloutError, match=r'rollout.engine=vllm needs .*pip install "opd_megatron\[vllm\]"'):
        build_engine(run_config(), tmp_path, 32, tmp_path / "log")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_the_configuration_reaches_the_engine(tmp_path):
    config = run_config(tensor=2, kv_cache_gib=0.5, request_timeout=9, dtype="fp32")
    engine = build_engine(config, tmp_path, 32, tmp_path / "log")
    assert engine.options == VLLMOptions(
        model_dir=tmp_path, max_model_len=32, dtype="fp32", tensor=2, kv_cache_gib=0.5, seed=3, request_timeout=9,
        log_path=tmp_path / "log",
    )  # fmt: skip


def test_the_engine_inherits_nothing_of_torchrun(tmp_path, monkeypatch):
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in {**torchrun, "OMP_NUM_THREADS": "1", "HF_HOME": "/kept"}.items():
        monkeypatch.setenv(name, value)
    environment = VLLMOptions(model_dir=tmp_path, max_model_len=32).environment(on_gpu=True)
    assert not torchrun.keys() & environment.keys()
    assert environment["HF_HOME"] == "/kept"
    assert environment["OMP_NUM_THREADS"] == "1"


def test_cpu_settings_are_for_cpus_only(tmp_path):
    options = VLLMOptions(model_dir=tmp_path, max_model_len=32, kv_cache_gib=0.5, tensor=2)
    assert options.environment(on_gpu=False)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert options.for_vllm(on_gpu=False)["kv_cache_memory_bytes"] == 2**29
    assert "OMP_WAIT_POLICY" not in options.environment(on_gpu=True)
    assert options.for_vllm(on_gpu=True).keys() & {"kv_cache_memory_bytes", "enforce_eager"} == set()


def test_weights_that_share_memory_survive_bucket_files():
    from safetensors.torch import load_file

    from opd_megatron.weight_sync.bucket_files import BucketFiles

    tensor = torch.arange(6.0).view(2, 3)
    with BucketFiles(torch.bfloat16) as files:
        path = files.write([("a", tensor), ("b", tensor), ("c", tensor.t())])
        loaded = load_file(path)
    assert all(torch.equal(loaded[name].float(), tensor) for name in ("a", "b"))
    assert torch.equal(loaded["c"].float(), tensor.t())
    assert not path.parent.exists(), "nothing stays behind"
