"""Conversion of a random model, Hugging Face -> Megatron -> Hugging Face: speed, memory of a rank, and every bit.

Seconds are from the moment the ranks have joined to the moment the folder is there, flushed to disk. `/ copy` is to a
plain copy of the same files, also flushed, made just before; neither finds its input in the page cache. `beyond shard`
is a rank's peak resident memory (VmHWM, so interpreter, libraries and mapped files are in it) less the bytes of the
parameters that it holds, for the worst rank. The model has the shape of Llama 3.2 3B (6.4 GB in bf16).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import REPOSITORY, BenchmarkError, Check, Report, Row, main

GIB = 2**30
LLAMA_3_2_3B: dict[str, Any] = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
SMALLER = LLAMA_3_2_3B | {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 6, "head_dim": 128,
                          "num_key_value_heads": 2, "num_hidden_layers": 8}  # fmt: skip
Layout = tuple[int, int]
TRIPS: list[tuple[Layout, Layout]] = [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((2, 2), (2, 1))]


def make_model(folder: Path, sizes: dict[str, Any]) -> None:
    """A folder of random bf16 weights, written tensor by tensor."""
    import torch
    from transformers import LlamaConfig

    from opd_megatron.weights.safetensors_writer import SafetensorsWriter
    from opd_megatron.weights.sharding import hf_shapes

    config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    folder.mkdir()
    torch.manual_seed(0)
    shapes = hf_shapes(config)
    with SafetensorsWriter(folder, shapes, torch.bfloat16, max_shard_size=2 * GIB) as writer:
        for name, shape in shapes.items():
            # Any 16 bits: the comparison is of bits, and normal numbers would be slower to make.
            bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
            writer.write(name, bits.view(torch.bfloat16))
    config.save_pretrained(folder)


def shard_bytes(folder: Path, tensor: int, pipeline: int) -> list[int]:
    """Bytes of the parameters of every rank, in rank order."""
    from opd_megatron.weights.hf_reader import load_hf_config
    from opd_megatron.weights.layout import ShardLayout
    from opd_megatron.weights.sharding import sharding_table

    config = load_hf_config(folder)
    padded = -(-config.vocab_size // (tensor * 8)) * tensor * 8
    per_stage = config.num_hidden_layers // pipeline
    sizes = []
    for stage in range(pipeline):
        layout = ShardLayout(padded, stage * per_stage, per_stage, 0, tensor, stage, pipeline)
        plan = sharding_table(config, layout)
        elements = sum(math.prod(plan.shard_shape(entry, layout)) for entry in plan.stage(stage))
        sizes += [elements * 2] * tensor
    return sizes


def forget(folder: Path) -> None:
    """Drops the files from the page cache, so that the next reader pays for the disk."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def seconds_of_copy(source: Path, out: Path) -> float:
    """A plain copy of every file, flushed to disk."""
    forget(source)
    started = time.perf_counter()
    out.mkdir()
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, out / path.name)
            with (out / path.name).open("rb") as stream:
                os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


def convert(direction: str, source: Path, out: Path, layout: Layout) -> list[dict[str, float]]:
    """Runs one conversion on ranks of its own; returns the figures of each."""
    forget(source)
    with tempfile.TemporaryDirectory() as report:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(layout[0] * layout[1]), str(Path(__file__).with_name("_weights_rank.py")),
            direction, str(source), str(out), *map(str, layout), report,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
        if done.returncode != 0:
            raise BenchmarkError(f"{direction} at {layout} exited with {done.returncode}\n{done.stderr[-2000:]}")
        paths = sorted(Path(report).iterdir(), key=lambda path: int(path.stem.split("_")[1]))
        return [json.loads(path.read_text()) for path in paths]


def measured(direction: str, source: Path, out: Path, layout: Layout, shards: list[int]) -> Row:
    size = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
    copy = seconds_of_copy(source, out.with_name("copy"))
    ranks = convert(direction, source, out, layout)
    seconds = max(rank["seconds"] for rank in ranks)
    beyond = [(rank["peak_rss"] - shard, shard) for rank, shard in zip(ranks, shards, strict=True)]
    return {
        "direction": direction,
        "(TP, PP)": str(layout),
        "GB": size / 1e9,
        "s": seconds,
        "MB/s": size / 1e6 / seconds,
        "copy, s": copy,
        "/ copy": seconds / copy,
        "shard, GiB": max(beyond)[1] / GIB,
        "beyond shard, GiB": max(beyond)[0] / GIB,
    }


def measure(arguments: argparse.Namespace) -> Report:
    from opd_megatron.convert.verify import different_tensors
    from opd_megatron.weights.hf_reader import load_hf_config
    from opd_megatron.weights.sharding import hf_shapes

    rows: list[Row] = []
    different = 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as root:
        work = Path(root)
        make_model(work / "model", SMALLER if arguments.quick else LLAMA_3_2_3B)
        for there, back in TRIPS[:1] if arguments.quick else TRIPS:
            megatron, hf = work / "megatron", work / "hf"
            rows.append(
                measured("hf_to_megatron", work / "model", megatron, there, shard_bytes(work / "model", *there))
            )
            rows.append(measured("megatron_to_hf", megatron, hf, back, shard_bytes(work / "model", *back)))
            different += len(different_tensors(work / "model", hf, list(hf_shapes(load_hf_config(work / "model")))))
            shutil.rmtree(megatron)
            shutil.rmtree(hf)
    checks = [
        Check.at_most(
            "peak memory of a rank beyond its shard, GiB", max(row["beyond shard, GiB"] for row in rows), 1.0
        ),
        Check.at_most("tensors that did not come back bit by bit", different, 0),
    ]
    note = "Random bf16 weights in the shape of " + ("a 140M Llama." if arguments.quick else "Llama 3.2 3B.")
    return Report(rows, checks, note)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", metavar="DIR", help="where the files go, four times the model's size (system's temp)")


if __name__ == "__main__":
    main("weights", __doc__, measure, add_arguments)
