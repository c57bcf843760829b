"""A model that is cut over pipeline stages unevenly, or into several parts on each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout


class StageLayout(PipelineParallelLayerLayout):
    """Upstream's list of what each stage has, for one rank.

    Upstream asks globals for the rank, also where its caller knows it, and counts virtual stages only where a global
    says that there are some.
    """

    def __init__(self, parts: Sequence[int], pipeline: int, pp_rank: int) -> None:
        """`parts`: layers of each, `weights.layout.layers_of_parts`."""
        rows = [[LayerType.decoder] * layers for layers in parts]
        rows[0] = [LayerType.embedding, *rows[0]]
        rows[-1] = [*rows[-1], LayerType.loss]
        super().__init__(rows, pipeline)
        self._pp_rank = pp_rank

    def get_num_layers_to_build(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        row: list[LayerType] = self.layout[self._pp_rank][vp_stage or 0]
        return row.count(layer_type)

    def get_layer_offset(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        chunk = vp_stage or 0
        before = [row[i] for i in range(chunk) for row in self.layout]
        before += [row[chunk] for row in self.layout[: self._pp_rank]]
        return sum(row.count(layer_type) for row in before)


class ModelChunks(torch.nn.ModuleList):
    """A rank's parts of a model with virtual stages, first to last. Names of parameters begin with the part's number.

    To those that ask for the head or for rows it is its last part, which alone can be the model's end.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        """`chunks`: of `model.HiddenStatesModel`."""
        super().__init__(chunks)

    @property
    def last(self) -> Any:
        return self[-1]

    @property
    def config(self) -> Any:
        return self.last.config

    @property
    def head_weight(self) -> torch.Tensor:
        """`HiddenStatesModel.head_weight`."""
        weight: torch.Tensor = self.last.head_weight
        return weight

    @property
    def is_embedding_too(self) -> bool:
        """`HiddenStatesModel.is_embedding_too`."""
        return False

    def response_rows(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`HiddenStatesModel.response_rows`."""
        rows: torch.Tensor = self.last.response_rows(hidden_states, mask)
        return rows

    def gather_index(self, mask: torch.Tensor) -> torch.Tensor | None:
        """`HiddenStatesModel.gather_index`."""
        index: torch.Tensor | None = self.last.gather_index(mask)
        return index

    def sharded_state_dict(self, **arguments: Any) -> dict[str, Any]:
        """What Megatron says of each tensor, part by part: what is stored has the same names as without parts."""
        chunks: list[Any] = list(self)
        return {str(number): chunk.sharded_state_dict(**arguments) for number, chunk in enumerate(chunks)}
