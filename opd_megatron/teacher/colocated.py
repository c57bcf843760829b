"""A teacher on the student's own ranks, in the same tensor- and pipeline-parallel layout."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig

from opd_megatron.config import Dtype
from opd_megatron.mcore.forward import response_hidden
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.mcore.model import HiddenStatesModel, build_gpt_model
from opd_megatron.types import Batch, TeacherStates
from opd_megatron.weights.load import load_weights


class ColocatedTeacher:
    """Frozen Megatron model. Its vocabulary is padded like the student's, so its head already lies where the
    student's does and needs no copy."""

    def __init__(
        self,
        source: Path,
        hf_config: PretrainedConfig,
        grid: ParallelGrid,
        *,
        padded_vocab: int,
        dtype: Dtype,
        weight: float,
        transformer_engine: bool,
    ) -> None:
        self.weight = weight
        self.vocab_size = hf_config.vocab_size
        self._grid = grid
        self._model: HiddenStatesModel = build_gpt_model(
            hf_config, grid, padded_vocab=padded_vocab, dtype=dtype, transformer_engine=transformer_engine
        )
        load_weights(self._model, source, hf_config, grid.layout(hf_config.num_hidden_layers, padded_vocab))
        self._model.requires_grad_(False)
        self._model.eval()

    @property
    def head(self) -> torch.Tensor | None:
        return self._model.head_weight.detach() if self._grid.is_last_stage else None

    def hidden_states(self, micro_batches: list[Batch]) -> TeacherStates:
        return TeacherStates(response_hidden(self._model, self._grid, micro_batches))
