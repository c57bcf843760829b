"""One contract between tokenizer, data and models, before anything starts: every id that can occur has a row in every
model, and only ids that the tokenizer knows and all models have are sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from opd_megatron.config import RunConfig
from opd_megatron.errors import ConfigError
from opd_megatron.models import ResolvedModels
from opd_megatron.types import Prompt


def check_ids(
    config: RunConfig,
    models: ResolvedModels,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    stop_ids: Sequence[int],
) -> tuple[int, ...]:
    """Checks the ids of prompts, gold answers, template and stop list against the rows of every model of the student's
    vocabulary.

    Args:
        prompts: all of the run. They are tokenized only where the tokenizer has ids that some model does not.

    Returns:
        Ids of the student that may not be sampled: another model has no row for them, or the tokenizer no token.

    Raises:
        ConfigError: names the id, its token, where it occurs and the model.
    """
    known = set(tokenizer.get_vocab().values())
    shortest, rows = min(_rows_of(config, models), key=lambda item: item[1])
    for token_id in stop_ids:
        if token_id >= rows:
            raise _beyond(
                tokenizer, token_id, "the stop list (template, tokenizer, generation_config.json)", shortest, rows
            )
    if max(known, default=0) >= rows:
        for prompt in prompts:
            read = [("prompt", prompt.token_ids), ("gold answer of prompt", prompt.answer_ids or ())]
            contexts = [(number, ids) for number, ids in prompt.contexts.items() if number not in models.aligned]
            read += [(f"teacher {number}'s form of prompt", ids) for number, ids in contexts]
            for what, ids in read:
                highest = max(ids, default=0)
                if highest >= rows:
                    raise _beyond(tokenizer, highest, f"the {what} {prompt.id!r}", shortest, rows)
    return tuple(
        token_id
        for token_id in range(models.student_config.vocab_size)
        if token_id >= rows or token_id not in known
    )  # fmt: skip


def _rows_of(config: RunConfig, models: ResolvedModels) -> list[tuple[str, int]]:
    teachers = enumerate(zip(config.teachers, models.teachers, strict=True))
    return [
        (f"student {config.student.path!r}", models.student_config.vocab_size),
        *(
            (f"teacher {teacher.path!r}", hf_config.vocab_size)
            for number, (teacher, (_, hf_config)) in teachers
            if number not in models.aligned
        ),
    ]


def _beyond(tokenizer: PreTrainedTokenizerBase, token_id: int, where: str, model: str, rows: int) -> ConfigError:
    token = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
    return ConfigError(
        f"token id {token_id} ({token!r}), which occurs in {where}, has no row in the embedding of {model}, which has "
        f"{rows}: use a tokenizer and template that belong to all models, or resize that model's embedding "
        "(resize_token_embeddings of transformers)"
    )
