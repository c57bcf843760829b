"""`opd-megatron data CONFIG --show N`: the prompts of a run as its models will see them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from opd_megatron.config import RunConfig
from opd_megatron.data.prompts import build_train_and_eval
from opd_megatron.data.show import describe_prompts
from opd_megatron.data.template import ChatTemplate
from opd_megatron.data.tokenizer import check_same_tokenizer, load_tokenizer, stop_token_ids
from opd_megatron.models import resolve_models
from opd_megatron.run.preflight import check_ids


def show_data(config: RunConfig, count: int) -> Iterator[str]:
    """Reads data and tokenizers as a run does, with the same checks, and writes lines about the first prompts."""
    models = resolve_models(config)
    tokenizer = load_tokenizer(str(models.tokenizer), config.trust_remote_code)
    notes: list[str] = []
    for teacher, (path, _) in zip(config.teachers, models.teachers, strict=True):
        other = load_tokenizer(str(path), config.trust_remote_code)
        notes += check_same_tokenizer(
            tokenizer, other, str(models.tokenizer), teacher.path, allow_missing=config.data.allow_missing_tokens
        )
    stream, held_out = build_train_and_eval(config, tokenizer, notes)
    stops = stop_token_ids(stream.dataset.template or ChatTemplate(tokenizer), models.student)
    check_ids(config, models, tokenizer, itertools.chain(stream.dataset, held_out), stops)
    yield from notes
    dropped = f", {stream.dataset.dropped} left out as too long" if stream.dataset.dropped else ""
    yield f"{len(stream.dataset)} prompts to train on{dropped}, {len(held_out)} held out with a gold answer"
    if len(stream.weights) > 1:
        for source, rows in zip(config.data.sources, stream.dataset.sources(), strict=True):
            yield f"  {source.source}: {len(rows)} prompts, weight {source.weight:g}"
    first = [stream.dataset[index] for index in range(min(count, len(stream.dataset)))]
    yield from describe_prompts(first, tokenizer, stops, config.rollout.max_new_tokens)
    for prompt in held_out[:1]:
        yield ""
        yield "the first that is held out:"
        yield from list(describe_prompts([prompt], tokenizer, stops, config.rollout.max_new_tokens))[1:]
