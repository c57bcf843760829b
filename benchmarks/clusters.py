"""What ranks do before and beside training: bytes and memory of checkpoints and of the start, groups and messages.

First table: a model of 82 million parameters in bf16, its gradients summed in buckets that are cut over all
data-parallel ranks, as on GPUs. `made to save` are tensors that saving puts together beside those that training holds;
peaks are of resident memory above what the rank had before; `read at the start` are weights read from storage. With
`--against DIR` (another checkout) the same of its code, as the columns `before`.

Second table: for every shipped configuration with as much data parallelism as 1, 8, 16 and 64 GPUs give it, the process
groups that all ranks make at the start, under a pretended process group; and the largest single message, by arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _clusters_rank
from harness import REPOSITORY, BenchmarkError, Check, Report, Row, main, markdown, show, write_between_markers
from weights import make_model

MODEL: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 32768, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
LAYOUTS = [(1, 2), (1, 4), (2, 2)]
WORLDS = (1, 8, 16, 64)
COLUMNS = ("written", "made to save", "peak of a save", "peak of a load", "read at the start")


def ranks_of(code: Path, model: Path, tensor: int, data: int) -> list[dict[str, int]]:
    """What each rank measures, with the code of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(_clusters_rank.__file__)
        environment = {**os.environ, "PYTHONPATH": f"{code}:{script.parent}", "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, str(script), folder, str(model), str(tensor), str(data)], text=True,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(tensor * data),
                                   "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
                stderr=subprocess.PIPE,
            )
            for rank in range(tensor * data)
        ]  # fmt: skip
        errors = [process.communicate()[1] for process in started]
        if any(process.returncode for process in started):
            raise BenchmarkError(f"a rank failed:\n{next(text for text in errors if 'Error' in text)[-2000:]}")
        return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(tensor * data)]


def checkpoints(arguments: argparse.Namespace, model: Path) -> Report:
    report = Report()
    for tensor, data in LAYOUTS[:1] if arguments.quick else LAYOUTS:
        name = f"TP{tensor} DP{data}" if tensor > 1 else f"DP{data}"
        now = ranks_of(REPOSITORY, model, tensor, data)
        before = ranks_of(arguments.against, model, tensor, data) if arguments.against else None
        for rank, found in enumerate(now):
            row: Row = {"layout": name, "rank": rank}
            for column in COLUMNS:
                if before is not None:
                    row[f"{column}, before, MB"] = before[rank][column] / 1e6
                row[f"{column}, MB"] = found[column] / 1e6
            report.rows.append(row)
        written = [found["written"] for found in now]
        fair = sum(written) / len(written)
        report.checks.append(Check.at_most(f"{name}: most written / fair share", max(written) / fair, 1.2))
        made = max(found["made to save"] for found in now)
        report.checks.append(Check.at_most(f"{name}: made to save / fair share", made / fair, 0.1))
        read = sum(found["read at the start"] for found in now)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        report.checks.append(Check.at_most(f"{name}: all ranks' reads / the files", read / size, 1.05))
    report.note = "82M parameters in bf16, buckets of 2M parameters; a save without a copy (`checkpoint.async_save`)."
    return report


@contextmanager
def counted_groups() -> Iterator[list[tuple[int, str]]]:
    """(ranks, backend) of every group that is made inside, as on a machine with GPUs."""
    import torch.distributed as dist

    made: list[tuple[int, str]] = []
    real, real_config = dist.new_group, dist.get_backend_config

    def new_group(ranks: list[int] | None = None, backend: str | None = None, **options: Any) -> Any:
        made.append((dist.get_world_size() if ranks is None else len(ranks), backend or "cpu:gloo,cuda:nccl"))
        return real(ranks, **options)

    dist.new_group, dist.get_backend_config = new_group, lambda group=None: "cpu:gloo,cuda:nccl"
    try:
        yield made
    finally:
        dist.new_group, dist.get_backend_config = real, real_config


def fitted(config: Any, world: int) -> dict[str, Any]:
    """Changes that bring a configuration to so many GPUs: engines on ranks of their own keep their share of them, the
    rest is data parallelism; a layout that is too large for them is left."""
    changes: dict[str, Any] = {"student.dtype": "bf16"}
    parallel, hosts = config.parallel, config.rollout.hosts
    if hosts:
        hosts = world * hosts // (hosts + parallel.model * parallel.data)
    if world < parallel.model + (hosts or 0):
        changes |= dict.fromkeys(("parallel.tensor", "parallel.pipeline", "parallel.expert", "rollout.tensor"), 1)
        changes |= {"parallel.sequence_parallel": "false", "rollout.hosts": "null", "rollout.placement": "student"}
        data = world
    else:
        changes |= {"rollout.hosts": hosts} if hosts else {}
        data = (world - config.teacher_ranks - (hosts or 0)) // parallel.model
    # A step of so many ranks has at least a sequence for each.
    prompts = -(-config.rollout.prompts_per_step // data) * data
    changes |= {"rollout.prompts_per_step": prompts, "parallel.micro_batch_size": "null"}
    return changes | {"parallel.data": data}


def groups_row(path: Path, world: int) -> Row:
    """The groups of a shipped configuration on so many GPUs."""
    from opd_megatron.config import decide_precision, load_config
    from opd_megatron.mcore.grid import ParallelGrid
    from opd_megatron.mcore.meta_shards import fake_process_group
    from opd_megatron.models.sizes import RunSizes
    from opd_megatron.places import cut_places
    from opd_megatron.planning.published import find_model
    from opd_megatron.run.build import join_groups
    from opd_megatron.run.checks import check_run
    from opd_megatron.system.groups import cpu_group

    changes = fitted(load_config(path), world)
    config, _ = decide_precision(load_config(path, [f"{key}={value}" for key, value in changes.items()]), {})
    models, parallel = check_run(config, find_model), config.parallel
    places = cut_places(config, world, min(world, 8), on_gpu=True)
    with fake_process_group(0, world), counted_groups() as made:
        join_groups(config, models, places)
        ParallelGrid.build(parallel.tensor, parallel.pipeline, models.data_parallel, ep_size=parallel.expert)
        cpu_group()  # of the weight sync
    message, size = largest_message(RunSizes(config, models))
    return {
        "configuration": path.stem,
        "GPUs": world,
        "groups": len(made),
        "of one rank": sum(ranks == 1 for ranks, _ in made),
        "on NCCL": sum(backend == "nccl" for _, backend in made),
        "on gloo": sum(backend == "gloo" for _, backend in made),
        "largest message": message,
        "MB": size / 1e6,
    }


def largest_message(sizes: Any) -> tuple[str, float]:
    """What the largest single message of a rank is, and its bytes."""
    config, student = sizes.config, sizes.models.student_config
    parameters = max(sizes.stage(student, stage).parameters for stage in range(sizes.pp_size))
    bucket = config.parallel.bucket_size or max(40_000_000, 1_000_000 * sizes.dp_size)
    messages = {"weights to an engine": config.rollout.bucket_mib * 2**20 / 3}
    if sizes.dp_size > 1:
        messages["gradients of a bucket"] = 4.0 * min(parameters, bucket)
        rows = sizes.models.padded_vocab(sizes.tp_size) // sizes.tp_size
        messages["embedding, at the start"] = rows * student.hidden_size * sizes.bytes_per_element
    if sizes.tp_size * sizes.pp_size > 1:
        messages["hidden states"] = sizes.tokens * student.hidden_size * sizes.bytes_per_element
    return max(messages.items(), key=lambda item: item[1])


def groups(arguments: argparse.Namespace) -> Report:
    from opd_megatron.errors import MissingPathError

    report, left_out = Report(), []
    for path in sorted((REPOSITORY / "configs").glob("*.yaml")):
        try:
            report.rows += [groups_row(path, world) for world in ((8,) if arguments.quick else WORLDS)]
        except MissingPathError:  # of its models not even the config is here
            left_out.append(path.stem)
    report.note = f"Not {', '.join(left_out)}, of whose models no config was within reach. " if left_out else ""
    report.note += "On one GPU without tensor and pipeline parallelism; engines' own ranks keep their share of all."
    return report


def measure(arguments: argparse.Namespace) -> Report:
    second = groups(arguments)
    show("groups of the shipped configurations", second)
    if arguments.write_docs:
        write_between_markers(REPOSITORY / "docs/measurements.md", "clusters_groups", markdown(second))
    folder = Path(tempfile.mkdtemp())
    try:
        make_model(folder / "model", MODEL)
        return checkpoints(arguments, folder / "model")
    finally:
        shutil.rmtree(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, measured beside this one")


if __name__ == "__main__":
    main("clusters", __doc__, measure, add_arguments)
