"""What the student and the teacher will see of some prompts, token by token where things begin and end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from opd_megatron.data.encoder import Encoder
from opd_megatron.types import Prompt

_EDGE = 12
"""Tokens shown at either end of what is longer."""


def describe_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    encoders: Mapping[int, Encoder] | None = None,
) -> Iterator[str]:
    """Writes lines for a terminal: each prompt as text and as tokens, its gold answer, and what ends an answer.
    `encoders`: of teachers with another tokenizer, by their number."""
    stops = ", ".join(_token(tokenizer, token_id) for token_id in stop_ids)
    yield f"an answer ends with {stops or 'nothing'}, or after {max_new_tokens} tokens"
    for prompt in prompts:
        task = f", task {prompt.task}" if prompt.task else ""
        yield ""
        yield f"{prompt.id}: {len(prompt.token_ids)} tokens{task}"
        teachers = "student continues" if prompt.contexts else "student continues, teacher scores the continuation of"
        yield f"  {teachers}:"
        yield from (f"    | {line}" for line in tokenizer.decode(prompt.token_ids).splitlines())
        yield f"  as tokens  {_tokens(tokenizer, prompt.token_ids)}"
        for number, ids in prompt.contexts.items():
            yield f"  teacher {number} reads in its place, {len(ids)} tokens:"
            reads = tokenizer if encoders is None or number not in encoders else encoders[number].tokenizer
            yield from (f"    | {line}" for line in reads.decode(ids).splitlines())
        if prompt.answer_ids is None:
            yield "  no gold answer"
            continue
        yield f"  gold answer, {len(prompt.answer_ids)} tokens: {prompt.answer!r}"
        yield f"  as tokens  {_tokens(tokenizer, prompt.answer_ids)}"
        if not prompt.answer_ids or prompt.answer_ids[-1] not in stop_ids:
            yield f"  it is cut at rollout.max_new_tokens={max_new_tokens}"


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    shown = [_token(tokenizer, token_id) for token_id in ids]
    if len(shown) > 2 * _EDGE:
        shown = [*shown[:_EDGE], f"... {len(shown) - 2 * _EDGE} more ...", *shown[-_EDGE:]]
    return " ".join(shown)


def _token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    return f"{token_id}:{tokenizer.decode([token_id])!r}"
