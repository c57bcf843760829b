"""The scripts of tools/checkpoint_convert under a torchrun of the user's, and what vLLM makes of their output."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_megatron.convert.verify import different_tensors
from opd_megatron.weights.hf_reader import load_hf_config
from opd_megatron.weights.sharding import hf_shapes
from tests.tiny_models import save_tiny

ROOT = Path(__file__).parents[2]
PROMPT = list(range(5, 70))
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", skip_tokenizer_init=True, max_model_len=128, enforce_eager=True)
greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
done = llm.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], greedy, use_tqdm=False)
print(json.dumps(list(done[0].outputs[0].token_ids)))
"""


def _script(ranks: int, name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         f"tools/checkpoint_convert/{name}.py", *words],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_scripts_under_torchrun_write_once_and_vllm_loads_the_result(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "hf", "qwen3_moe", head_dim=32, moe_intermediate_size=64, tie_word_embeddings=False)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    said = _script(2, "hf_to_megatron", "--hf", str(source), "--out", str(megatron), "--expert", "2")
    assert said == f"wrote {megatron}\n"
    said = _script(2, "megatron_to_hf", "--megatron", str(megatron), "--out", str(back), "--tensor", "2")
    assert said == f"wrote {back}\n"
    assert different_tensors(source, back, list(hf_shapes(load_hf_config(source)))) == []

    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", VLLM, str(back), json.dumps(PROMPT)], cwd=tmp_path, capture_output=True, text=True,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=16, min_new_tokens=16)
    (answer,) = (line for line in done.stdout.splitlines() if line.startswith("["))  # vLLM prints its farewell after it
    assert json.loads(answer) == expected[0, len(PROMPT) :].tolist()
