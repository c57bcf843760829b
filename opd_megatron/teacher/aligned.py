"""A teacher with another tokenizer (`teachers.N.alignment`), wherever it runs.

It reads its own tokens: its view of a step has other prompts and other answers (`routing.Views`), which its placement
scores like any. What is different is its LM head: cut over the student's ranks so that the rows of the tokens that both
have lie where the student's columns do, and all others are dealt out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from opd_megatron.data.alignment import TokenizerPair
from opd_megatron.losses.shared import TranslatedHead
from opd_megatron.mcore.cpu.platform import device
from opd_megatron.mcore.grid import ParallelGrid
from opd_megatron.models import ResolvedModels
from opd_megatron.teacher.base import Teacher
from opd_megatron.teacher.heads import Heads
from opd_megatron.types import DTYPES, Batch, TeacherInputs
from opd_megatron.weights.load import load_head_rows
from opd_megatron.weights.shared_reading import read_once


class AlignedTeacher:
    """Hands over what another teacher gives, with the translated head."""

    def __init__(self, teacher: Teacher, head: TranslatedHead | None) -> None:
        """`head`: on the student's last stage."""
        self.teacher, self._head = teacher, head
        self.beside, self.changes = teacher.beside, teacher.changes

    def submit(self, micro_batches: list[Batch]) -> None:
        """Has its view of the step scored."""
        self.teacher.submit(micro_batches)

    def collect(self) -> TeacherInputs:
        """Waits for it."""
        found = self.teacher.collect()
        return found if self._head is None else replace(found, outputs=_WithHead(found.outputs, self._head))

    def after_step(self) -> None:
        """Passes it on."""
        self.teacher.after_step()

    def move_out(self) -> None:
        """Passes it on."""
        self.teacher.move_out()

    def move_back(self) -> None:
        """Passes it on."""
        self.teacher.move_back()

    def close(self) -> None:
        """Passes it on."""
        self.teacher.close()


class _WithHead(Sequence[Any]):
    """(states, translated head) of each micro batch, asked for once and in order as the teacher's own are."""

    def __init__(self, outputs: Sequence[Any], head: TranslatedHead) -> None:
        self._outputs, self._head = outputs, head

    def __len__(self) -> int:
        return len(self._outputs)

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, TranslatedHead]:
        return self._outputs[index][0], self._head


class TranslatedHeads(Heads):
    """The head of one teacher with another vocabulary."""

    def __init__(self, grid: ParallelGrid, models: ResolvedModels, pair: TokenizerPair) -> None:
        """`grid`: the student's."""
        super().__init__(grid, models.padded_vocab(grid.tp_size))
        self._pair, self._vocab_size = pair, models.vocab_size
        self._translated: TranslatedHead | None = None

    def of(self, folder: Path, hf_config: PretrainedConfig, dtype: str) -> torch.Tensor | None:
        """[n + m, h]: this rank's rows; None off the last stage. Raises WeightsError."""
        head = self.translated(folder, hf_config, dtype)
        return None if head is None else head.weight

    def translated(self, folder: Path, hf_config: PretrainedConfig, dtype: str) -> TranslatedHead | None:
        """The same with what says which rows these are."""
        if not self._grid.is_last_stage:
            return None
        if self._translated is None:
            self._translated = self._load(folder, hf_config, dtype)
        return self._translated

    def _load(self, folder: Path, hf_config: PretrainedConfig, dtype: str) -> TranslatedHead:
        rank, ranks, theirs = self._grid.tp_rank, self._grid.tp_size, hf_config.vocab_size
        pairs = [
            (mine, other)
            for mine, other in zip(*self._pair.shared, strict=True)
            if mine < self._vocab_size and other < theirs
        ]
        first = rank * self._rows
        own = [(mine - first, other) for mine, other in pairs if first <= mine < first + self._rows]
        paired = {other for _, other in pairs}
        others = [token_id for token_id in range(theirs) if token_id not in paired][rank::ranks]
        ids = torch.tensor([*(other for _, other in own), *others], dtype=torch.int64)
        weight = torch.empty(len(ids), hf_config.hidden_size, dtype=DTYPES[dtype], device=device())
        read_once(
            lambda: load_head_rows(folder, hf_config, ids, weight),
            weight, self._grid.groups.dp_cp, f"the head of {str(folder)!r} could not be read",
        )  # fmt: skip
        places = torch.full((theirs,), -1, dtype=torch.int64)
        places[ids] = torch.arange(len(ids))
        return TranslatedHead(
            weight,
            torch.tensor([column for column, _ in own], dtype=torch.int64, device=device()),
            places.to(device()),
            conditional=len(pairs) in (self._vocab_size, theirs),
        )
