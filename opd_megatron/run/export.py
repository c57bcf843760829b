"""The trained student as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from opd_megatron.config import decided
from opd_megatron.errors import CheckpointError, OPDError
from opd_megatron.run.build import RunParts
from opd_megatron.system.collectives import raise_on_all_ranks
from opd_megatron.types import DTYPES
from opd_megatron.weight_sync.gathered import gather_student
from opd_megatron.weights.save import save_hf


def export_hf(run: RunParts) -> Path:
    """Writes the student as the run directory's `hf/`. Collective over all ranks.

    Raises OPDError on every rank when rank 0 cannot write; an earlier export is left as it was.
    """
    buckets = gather_student(run.student, bucket_bytes=run.config.rollout.bucket_mib * 2**20)
    failure: Exception | None = None
    if dist.get_rank() == 0:
        dtype = DTYPES[decided(run.config.student.dtype)]
        try:
            save_hf(
                buckets, run.student.hf_config, run.run_dir.hf_dir, tokenizer_dir=run.models.tokenizer,
                model_dir=run.models.student, stop_token_ids=run.stop_token_ids, dtype=dtype,
            )  # fmt: skip
        except (OPDError, OSError) as error:
            failure = error
    for _ in buckets:  # the export is collective: also when nobody reads it, or its reader failed
        pass
    raise_on_all_ranks(failure, f"the student was not exported to {str(run.run_dir.hf_dir)!r}", CheckpointError)
    return run.run_dir.hf_dir
