"""What every rank of a test imports: the server that forks them has it ready, as Megatron alone takes ten seconds."""

import importlib
import os

os.environ["OMP_NUM_THREADS"] = "1"

for _name in (
    "torch",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "transformers.models.auto",
):
    importlib.import_module(_name)
