"""Ids that no request may draw, in vLLM: a logits processor of all requests, named in the engine's options."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

BANNED = "opd_banned_token_ids"
"""Key of vLLM's `additional_config` that holds them."""


class BannedTokens(LogitsProcessor):
    """Sets the banned ids' logits to minus infinity, before temperature: their probability is exactly 0."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._ids = torch.tensor(vllm_config.additional_config[BANNED], dtype=torch.int64, device=device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill_(-1, self._ids, -torch.inf)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """All requests are alike."""
