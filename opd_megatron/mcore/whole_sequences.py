"""Numbers of whole sequences where context-parallel ranks have parts of them: one number a token travels, no states."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from opd_megatron.data.context import natural_order
from opd_megatron.losses.policy import PolicyTerm, prefix_shares, sequence_means
from opd_megatron.types import Batch, places_of


class WholeSequences:
    """A micro batch, for one context-parallel rank that holds the columns of `batch`."""

    def __init__(self, batch: Batch, mask: torch.Tensor, group: dist.ProcessGroup) -> None:
        """`mask` [1, S / C], on the CPU: the tokens that count. Collective over `group`."""
        assert batch.lengths is not None
        device = batch.tokens.device
        self._places, self._columns, self._group = places_of(mask, device), mask.shape[1], group
        order = natural_order(batch.lengths, group.size())
        self._order = order.to(device)
        start = group.rank() * mask.shape[1]
        mine = ((order >= start) & (order < start + mask.shape[1])).nonzero().squeeze(1)
        # Where in the whole row each of this rank's columns is.
        self._mine = mine[order[mine].argsort()].to(device)
        lengths = torch.tensor(batch.lengths)
        self._sequence_ids = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
        self._counts = self._whole(mask[0].float().to(device))

    def with_gaps(self, policy: PolicyTerm, logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> PolicyTerm:
        """Gives a term what it asks of whole sequences. `logprobs`, `teacher_logprobs`: [T] of the sampled tokens.
        Collective."""
        assert policy.rollout_logprobs is not None
        rollout = policy.rollout_logprobs.to(logprobs.dtype)
        gaps = shares = None
        if policy.level == "sequence":
            whole = self._of_tokens(logprobs - rollout)
            gaps = self._at_tokens(sequence_means(whole, self._counts, self._sequence_ids))
        if policy.prefix_gamma is not None:
            whole = self._of_tokens(teacher_logprobs - rollout)
            shares = self._at_tokens(prefix_shares(whole, self._sequence_ids))
        return replace(policy, sequence_gaps=gaps, prefix_shares=shares)

    def _of_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """[T] of this rank's tokens -> [S], 0 where no token counts."""
        columns = values.new_zeros(self._columns)
        return self._whole(columns.index_copy(0, self._places, values))

    def _whole(self, columns: torch.Tensor) -> torch.Tensor:
        parts = columns.new_empty(self._group.size() * len(columns))
        dist.all_gather_into_tensor(parts, columns.contiguous(), group=self._group)
        return parts.index_select(0, self._order)

    def _at_tokens(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[self._mine].index_select(0, self._places)
