"""How tokens are split into chunks whose logits exist at the same time."""

from __future__ import annotations

import torch

from opd_megatron.losses.policy import PolicyTerm

# Bytes of one chunk's student logits. Fewer, larger chunks make larger matrix products and fewer passes over d head,
# which is worth more than a chunk that stays in the cache: the passes over the vocabulary go row by row anyway.
_CHUNK_BYTES = {"cpu": 160 * 2**20}
_CHUNK_BYTES_GPU = 512 * 2**20
_MIN_CHUNK_TOKENS = 64


def chunk_bounds(tokens: int, head: torch.Tensor, chunk_tokens: int | None, policy: PolicyTerm | None) -> list[slice]:
    """Splits [0, tokens) into slices of at most `chunk_tokens`, or of equal size in bounded memory.

    Computed from what is the same on all ranks of a group. A policy term at the level of sequences moves every bound to
    the end of a sequence, because a sequence's ratio needs all its tokens.
    """
    size = chunk_tokens or default_chunk(tokens, len(head) * head.element_size(), head.device.type)
    if policy is None or not policy.of_sequences or policy.sequence_ids is None:
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
    counts = policy.sequence_counts
    if counts is None:
        counts = policy.sequence_ids.unique_consecutive(return_counts=True)[1].tolist()
    chunks, start, stop = [], 0, 0
    for count in counts:
        if stop > start and stop + count - start > size:
            chunks.append(slice(start, stop))
            start = stop
        stop += count
    return [*chunks, slice(start, stop)] if stop > start else chunks


def default_chunk(tokens: int, row_bytes: int, device: str) -> int:
    """Chooses the tokens of a chunk: equal parts of `tokens` whose logits, `row_bytes` a token, stay within the
    device's bound."""
    tokens = max(tokens, 1)
    limit = _CHUNK_BYTES.get(device, _CHUNK_BYTES_GPU) // row_bytes
    chunks = -(-tokens // max(limit, _MIN_CHUNK_TOKENS))
    return -(-tokens // chunks)
