"""Teachers' LM heads at the student's side: cut over its last-stage ranks, whatever layout the teacher has."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig

from opd_megatron.mcore.cpu.platform import device
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.types import DTYPES
from opd_megatron.weights.load import load_head
from opd_megatron.weights.shared_reading import read_once


class Heads:
    """One for each file: teachers that are the same share theirs."""

    def __init__(self, grid: ParallelGrid, padded_vocab: int) -> None:
        """`grid`: the student's. `padded_vocab`: of every head in the run."""
        self._grid, self._rows = grid, padded_vocab // grid.tp_size
        self._heads: dict[tuple[Path, str], torch.Tensor] = {}

    def of(self, folder: Path, hf_config: PretrainedConfig, dtype: str) -> torch.Tensor | None:
        """[v, h]: this rank's rows; None off the last stage. Raises WeightsError."""
        if not self._grid.is_last_stage:
            return None
        key = (folder.resolve(), dtype)
        if key not in self._heads:
            head = torch.empty(self._rows, hf_config.hidden_size, dtype=DTYPES[dtype], device=device())
            rank, ranks = self._grid.tp_rank, self._grid.tp_size
            read_once(
                lambda: load_head(folder, hf_config, head, tp_rank=rank, tp_size=ranks),
                head, self._grid.groups.dp_cp, f"the head of {str(folder)!r} could not be read",
            )  # fmt: skip
            self._heads[key] = head
        return self._heads[key]
