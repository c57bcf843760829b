"""A tiny random Llama, its weights as buckets, and transformers as the independent reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opd_megatron.types import Bucket, Prompt, Rollout, SampleRequest

VOCAB = 250  # not a multiple of vLLM's vocabulary padding


def tiny_config(tied: bool = True) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=192,
        vocab_size=VOCAB, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.1,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def tiny_model(seed: int, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(tied)).eval()


def save_config(folder: Path, tied: bool = True) -> Path:
    """A model folder without weights: engines get theirs from the trainer."""
    tiny_config(tied).save_pretrained(folder)
    return folder


def buckets_of(model: LlamaForCausalLM, size: int = 4) -> Iterator[Bucket]:
    """Every parameter once (a tied head as the embedding only), `size` to a bucket."""
    named = [(name, p.detach()) for name, p in model.named_parameters()]
    for i in range(0, len(named), size):
        yield named[i : i + size]


def prompts_of(count: int, length: int, seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (count, length), generator=generator).tolist()
    return [Prompt(f"p{i}", tuple(row), "") for i, row in enumerate(ids)]


@torch.no_grad()
def reference_logprobs(model: LlamaForCausalLM, ids: list[int], temperature: float = 1.0) -> list[float]:
    """log p(token i | before) for i = 1 .. len - 1."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def requests_of(prompts: Sequence[Prompt], seed: int | None = None) -> list[SampleRequest]:
    """One request a prompt, each with a seed of its own where one is given."""
    return [SampleRequest(p, None if seed is None else seed + i, group=i) for i, p in enumerate(prompts)]


def ids_of(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """The sampled tokens of each rollout."""
    return [rollout.response_ids.tolist() for rollout in rollouts]
