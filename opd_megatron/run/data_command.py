"""`opd-megatron data CONFIG --show N`: the prompts of a run as its models will see them."""

from __future__ import annotations

from collections.abc import Iterator

from opd_megatron.config import RunConfig
from opd_megatron.data.show import describe_prompts
from opd_megatron.models import resolve_models
from opd_megatron.run.inputs import read_inputs


def show_data(config: RunConfig, count: int) -> Iterator[str]:
    """Reads data and tokenizers as a run does, with the same checks, and writes lines about the first prompts."""
    inputs = read_inputs(config, resolve_models(config))
    stream, held_out, tokenizer, stops = inputs.prompts, inputs.held_out, inputs.tokenizer, inputs.stop_token_ids
    yield from inputs.notes
    dropped = f", {stream.dataset.dropped} left out as too long" if stream.dataset.dropped else ""
    yield f"{len(stream.dataset)} prompts to train on{dropped}, {len(held_out)} held out with a gold answer"
    if len(stream.weights) > 1:
        for source, rows in zip(config.data.sources, stream.dataset.sources(), strict=True):
            yield f"  {source.source}: {len(rows)} prompts, weight {source.weight:g}"
    first = [stream.dataset[index] for index in range(min(count, len(stream.dataset)))]
    encoders = stream.dataset.encoders
    yield from describe_prompts(first, tokenizer, stops, config.rollout.max_new_tokens, encoders)
    for prompt in held_out[:1]:
        yield ""
        yield "the first that is held out:"
        yield from list(describe_prompts([prompt], tokenizer, stops, config.rollout.max_new_tokens, encoders))[1:]
