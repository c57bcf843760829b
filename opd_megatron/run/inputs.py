"""What a run reads before any process group exists: tokenizers, prompts, what ends an answer; checked against each
other and against every model."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from opd_megatron.config import RunConfig
from opd_megatron.data.alignment import TokenizerPair
from opd_megatron.data.encoder import Encoder
from opd_megatron.data.given_answers import GivenAnswers
from opd_megatron.data.prompts import PromptStream, build_train_and_eval
from opd_megatron.data.template import ChatTemplate
from opd_megatron.data.tokenizer import check_same_tokenizer, load_tokenizer, stop_token_ids, tokenizer_fingerprint
from opd_megatron.models import ResolvedModels
from opd_megatron.rewards import check_rewards
from opd_megatron.run.preflight import check_ids
from opd_megatron.system.once_a_node import once_a_node
from opd_megatron.teacher import check_tasks
from opd_megatron.types import Prompt


@dataclass(frozen=True, slots=True)
class RunInputs:
    """Tokens in, and where they stop."""

    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    prompts: PromptStream
    held_out: list[Prompt]
    stop_token_ids: tuple[int, ...]
    """Tokens that end an answer."""
    banned_ids: tuple[int, ...]
    """Ids that are never sampled: some model has no row for them, or the tokenizer no token."""
    teacher_tokenizers: list[str] = field(default_factory=list)
    """A fingerprint of each teacher's."""
    notes: list[str] = field(default_factory=list)
    """What a user should know, though it is no error."""
    pairs: dict[int, TokenizerPair] = field(default_factory=dict)
    """Of the student's tokenizer and that of each teacher with another one, by the teacher's number."""
    rooms: dict[int, int] = field(default_factory=dict)
    """Tokens that a prompt may have in the context of each teacher, by its number."""
    given: GivenAnswers | None = None
    """Answers that are not sampled; None where all are."""


def inputs_once_a_node(config: RunConfig, models: ResolvedModels) -> RunInputs:
    """The same as `read_inputs`, of ranks of which one on each machine reads, checks and tokenizes."""
    return once_a_node("inputs", lambda: read_inputs(config, models))


def read_inputs(config: RunConfig, models: ResolvedModels) -> RunInputs:
    """Reads and checks them.

    Raises:
        OPDError: MissingPathError, DataError, TokenizerMismatchError or ConfigError, for the first thing that is wrong.
    """
    tokenizer = load_tokenizer(str(models.tokenizer), config.trust_remote_code)
    notes: list[str] = []
    theirs, fingerprints = [], []
    encoders: dict[int, Encoder] = {}
    for number, (teacher, (path, _)) in enumerate(zip(config.teachers, models.teachers, strict=True)):
        if teacher.is_student:
            fingerprints.append(tokenizer_fingerprint(tokenizer))
            continue
        other = load_tokenizer(str(path), config.trust_remote_code)
        fingerprints.append(tokenizer_fingerprint(other))
        if number in models.aligned:
            encoders[number] = Encoder.of(other, config.data)
            continue
        theirs.append((teacher.path, other))
        notes += check_same_tokenizer(
            tokenizer, other, str(models.tokenizer), teacher.path, allow_missing=config.data.allow_missing_tokens
        )
    given = GivenAnswers.of(config.data, seed=config.seed, longest=config.rollout.max_new_tokens)
    prompts, held_out = build_train_and_eval(config, tokenizer, notes, encoders, given)
    if given is not None:
        given.check([prompts.dataset[row] for row in prompts.dataset.rows_of(given.saved or ())])
    rooms = _rooms(config, models)
    prompts.dataset.check_contexts(rooms)
    notes += check_tasks(config, prompts.dataset.tasks())
    check_rewards(config.rewards, prompts.dataset.rows)
    check_rewards(config.rewards.of_evaluation(config.evaluation.task), held_out)
    check_tasks(config, [prompt.task for prompt in held_out])
    stops = stop_token_ids(prompts.dataset.template or ChatTemplate(tokenizer), models.student)
    for name, other in theirs:
        notes += _other_end(name, ChatTemplate.of(other, config.data), tokenizer, stops)
    pairs = {
        number: _pair(config, models, number, Encoder.of(tokenizer, config.data), encoder, stops, notes)
        for number, encoder in encoders.items()
    }
    banned = check_ids(config, models, tokenizer, itertools.chain(prompts.dataset, held_out), stops)
    return RunInputs(tokenizer, prompts, held_out, stops, banned, fingerprints, notes, pairs, rooms, given)


def _pair(
    config: RunConfig, models: ResolvedModels, number: int, mine: Encoder, other: Encoder, stops: tuple[int, ...],
    notes: list[str],
) -> TokenizerPair:  # fmt: skip
    """Lays the two tokenizers side by side, and says how much they share: never silently."""
    teacher = config.teachers[number]
    pair = TokenizerPair(
        mine.tokenizer, other.tokenizer, stops=stops, ends=(mine.end_of_turn, other.end_of_turn),
        names=(f"the student ({models.tokenizer})", f"teacher {teacher.path!r}"),
    )  # fmt: skip
    how = {
        "spans": "log-probabilities are compared over spans of text that both cut out alike",
        "shared_vocabulary": "distributions are compared over these and one event for all others, where both have read "
        "the same text",
    }
    notes.append(
        f"teacher {teacher.path} has another tokenizer ({len(other.tokenizer)} tokens), {len(pair.shared[0])} of the "
        f"student's {len(mine.tokenizer)} are in it: {how[str(teacher.alignment)]}"
    )
    return pair


def _rooms(config: RunConfig, models: ResolvedModels) -> dict[int, int]:
    """Tokens that a prompt may have in the context of each teacher, by its number."""
    limits = [getattr(hf_config, "max_position_embeddings", None) for _, hf_config in models.teachers]
    answer = config.rollout.max_new_tokens
    return {number: sys.maxsize if limit is None else limit - answer for number, limit in enumerate(limits)}


def _other_end(
    name: str, teachers: ChatTemplate, tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...]
) -> list[str]:
    """Warns where a teacher ends its answers with a token that ends none of the student's: a base student of an
    instruction-tuned teacher."""
    end = teachers.end_of_turn_id()
    if end is None or end in stops:
        return []
    ours = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(list(stops)))
    return [
        f"warning: teacher {name!r} ends its answers with {teachers.tokenizer.convert_ids_to_tokens(end)!r}, the "
        f"student's end with {ours}: it would learn to run on; give it the teacher's template and end with "
        f"student.tokenizer={name}, or take a student that ends as its teacher does "
        "(docs/troubleshooting.md: Answers grow without end)"
    ]
