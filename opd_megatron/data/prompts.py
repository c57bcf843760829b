"""Rows to prompts: chat template, length limit, gold answers as tokens, and an endless stream that can resume."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from opd_megatron.config import RunConfig
from opd_megatron.data.contexts import ContextTemplate, context_templates
from opd_megatron.data.encoder import Encoder
from opd_megatron.data.given_answers import GivenAnswers
from opd_megatron.data.rows import Example
from opd_megatron.data.sources import read_rows
from opd_megatron.data.template import ChatTemplate
from opd_megatron.errors import CheckpointError, DataError
from opd_megatron.types import Prompt


class PromptDataset:
    """Prompts, tokenized when they are asked for.

    A token is at least one byte of text, so only rows with more bytes than `max_prompt_tokens` are tokenized up
    front, to find those that are too long before training starts rather than in the middle of it.

    Args:
        tokenizer: the student's.
        template: `chat`, or `raw` to continue the text as it stands.
        template_kwargs: arguments of the chat template.
        max_prompt_tokens: limit for a prompt, template included; None for no limit.
        drop_long: leave rows over the limit out (`dropped` counts them) instead of raising.
        max_answer_tokens: `answer_ids` are cut to this length.
        contexts: prompts of teachers' own, by the teacher's number.
        encoders: of teachers with another tokenizer, likewise.

    Raises:
        DataError: no rows, a row over the limit (here or when it is reached), or no chat template.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "chat",
        system_prompt: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        max_prompt_tokens: int | None = None,
        drop_long: bool = False,
        max_answer_tokens: int | None = None,
        contexts: Mapping[int, ContextTemplate] | None = None,
        encoders: Mapping[int, Encoder] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, system_prompt, template_kwargs or {}) if template == "chat" else None
        self._encoder = Encoder(tokenizer, self.template, system_prompt)
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self.contexts, self.encoders = contexts or {}, encoders or {}
        self.dropped = 0
        self._end_of_turn = self._encoder.end_of_turn
        self._rows = list(rows)
        if not self._rows:
            raise DataError("the data set has no rows: give a data.source that has some")
        self._check_lengths(drop_long)
        self._index_of = {row.id: index for index, row in enumerate(self._rows)}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        row = self._rows[index]
        token_ids = self._encode(row)
        if self._is_long(len(token_ids)):
            raise self._too_long(row, len(token_ids))
        answer_ids = None if row.answer is None else self._encode_answer(row.answer)
        contexts = {number: encoder.prompt(shown) for number, encoder, shown in self._read_by_teachers(row)}
        return Prompt(row.id, token_ids, row.question, row.answer, answer_ids, row.task, row.fields, contexts)

    def _read_by_teachers(self, row: Example) -> Iterator[tuple[int, Encoder, Example]]:
        """What teachers read that do not read what the student does: (number, by what, which row)."""
        for number in sorted(self.contexts.keys() | self.encoders.keys()):
            template = self.contexts.get(number)
            if template is not None and template.has_sibling and number not in self.encoders:
                continue  # known when there is one
            yield (
                number,
                self.encoders.get(number, self._encoder),
                row if template is None else template.applied_to(row),
            )

    def contexts_with(self, name: str, sibling: str) -> dict[int, tuple[int, ...]]:
        """What teachers whose prompt has a `{sibling}` read of a row with that one, by their number."""
        row = self._rows[self._index_of[name]]
        return {
            number: self.encoders.get(number, self._encoder).prompt(template.applied_to(row, sibling))
            for number, template in self.contexts.items()
            if template.has_sibling
        }

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def sources(self) -> list[list[int]]:
        """Lists the rows of each source, by index."""
        found: dict[int, list[int]] = {}
        for index, row in enumerate(self._rows):
            found.setdefault(row.source, []).append(index)
        return [found[source] for source in sorted(found)]

    @property
    def rows(self) -> Sequence[Example]:
        """All rows, before they are tokenized."""
        return self._rows

    def rows_of(self, ids: Container[str]) -> list[int]:
        """Finds the rows with one of these names, by index."""
        return [index for index, row in enumerate(self._rows) if row.id in ids]

    def tasks(self) -> list[str | None]:
        """The task of each row."""
        return [row.task for row in self._rows]

    def check_contexts(self, rooms: Mapping[int, int]) -> None:
        """Makes sure that what teachers read fits: `rooms` are tokens that a prompt may have, by the teacher's number.

        Raises:
            DataError: names the first row for which it does not, or without what its template wants.
        """
        around: dict[int, int] = {}
        for row in self._rows:
            for number, encoder, shown in self._read_by_teachers(row):
                around.setdefault(number, encoder.tokens_around())
                if encoder.most_tokens(shown, around[number]) <= rooms[number]:
                    continue
                length = len(encoder.prompt(shown))
                if length > rooms[number]:
                    template = self.contexts.get(number)
                    what = f"teacher {number}'s tokenizer" if template is None else template.key
                    raise DataError(
                        f"{what} makes {length} tokens of prompt {row.id!r}, and its context has room "
                        f"for {rooms[number]} before rollout.max_new_tokens of an answer: shorten it, or leave "
                        "long rows out"
                    )

    def fingerprint(self) -> str:
        """Hashes all rows, in order, but not where they lie."""
        digest = sha256()
        for row in self._rows:
            content = (row.question, row.answer, row.messages, *([dict(row.columns)] if row.columns else []))
            content += (dict(row.fields),) if row.fields else ()
            digest.update(repr(content).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:32]

    def _encode(self, row: Example) -> tuple[int, ...]:
        return self._encoder.prompt(row)

    def _encode_answer(self, answer: str) -> tuple[int, ...]:
        ids = list(self.tokenizer(answer, add_special_tokens=False).input_ids)
        if self._end_of_turn is not None:
            ids.append(self._end_of_turn)
        return tuple(ids[: self.max_answer_tokens])

    def _is_long(self, length: int) -> bool:
        return self.max_prompt_tokens is not None and length > self.max_prompt_tokens

    def _check_lengths(self, drop: bool) -> None:
        around = self._encoder.tokens_around()
        kept = []
        for row in self._rows:
            size = self._encoder.most_tokens(row, around)
            length = len(self._encode(row)) if self._is_long(size) else 0
            if not self._is_long(length):
                kept.append(row)
            elif not drop:
                raise self._too_long(row, length)
        self.dropped = len(self._rows) - len(kept)
        self._rows = kept
        if not kept:
            raise DataError(
                f"all {self.dropped} prompts are longer than data.max_prompt_tokens={self.max_prompt_tokens}: raise it"
            )

    def _too_long(self, row: Example, length: int) -> DataError:
        return DataError(
            f"prompt {row.id!r} has {length} tokens, over data.max_prompt_tokens={self.max_prompt_tokens}: raise the "
            "limit, or leave long prompts out with data.drop_long_prompts=true"
        )


class _Share:
    """The rows of one source, shuffled anew each epoch."""

    def __init__(self, rows: list[int], weight: float, seed: tuple[int, ...]) -> None:
        self.rows, self.weight, self._seed = np.asarray(rows), weight, seed
        self.epoch = self.position = self.taken = 0
        self._order = self._shuffle()

    def take(self, count: int) -> list[int]:
        indices: list[int] = []
        while len(indices) < count:
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffle()
            taken = self._order[self.position :][: count - len(indices)]
            self.position += len(taken)
            indices.extend(int(index) for index in self.rows[taken])
        self.taken += count
        return indices

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.taken = int(state.get("taken", 0))
        self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        first, *rest = self._seed
        return np.random.default_rng((first, self.epoch, *rest)).permutation(len(self.rows))


class PromptStream:
    """Prompts for one step after the other, shuffled anew each epoch; the same on every rank.

    The order of epoch e depends on (seed, e) alone, so the cursor of a few numbers is all that a resume needs. A
    step that reaches the end of an epoch is filled from the next one. Several sources take turns, so that at every
    point of the run each has had its share to within one prompt.

    Args:
        weights: share of each source; None for one source.
    """

    def __init__(
        self, dataset: PromptDataset, prompts_per_step: int, seed: int, weights: Sequence[float] | None = None
    ) -> None:
        self.dataset = dataset
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.weights = list(weights or [1.0])
        rows = dataset.sources() if weights else [list(range(len(dataset)))]
        shares = zip(rows, self.weights, strict=True)
        self._shares = [
            _Share(indices, weight, (seed, *([number] if number else [])))
            for number, (indices, weight) in enumerate(shares)
        ]

    def next_prompts(self) -> list[Prompt]:
        """Takes the next `prompts_per_step` prompts."""
        if len(self._shares) == 1:
            indices = self._shares[0].take(self.prompts_per_step)
        else:
            indices = [self._due().take(1)[0] for _ in range(self.prompts_per_step)]
        return [self.dataset[index] for index in indices]

    def state_dict(self) -> dict[str, Any]:
        """Returns the data cursor, with the data set and seed that it is valid for."""
        first, *others = [share.state_dict() for share in self._shares]
        state: dict[str, Any] = {**first, "seed": self.seed, "rows": len(self.dataset)}
        return state | ({"sources": others} if others else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken. Raises CheckpointError when data set or seed are others."""
        mine = {"rows": len(self.dataset), "seed": self.seed, "sources": len(self._shares) - 1}
        theirs = {"rows": int(state["rows"]), "seed": int(state["seed"]), "sources": len(state.get("sources", ()))}
        for name, value in mine.items():
            if theirs[name] != value:
                raise CheckpointError(
                    f"the checkpoint's data cursor is for {name}={theirs[name]}, this run has {value}: restore "
                    "data and seed of that run, or start in another output_dir"
                )
        for share, cursor in zip(self._shares, [state, *state.get("sources", ())], strict=True):
            share.load_state_dict(cursor)

    def _due(self) -> _Share:
        """Finds the source that is furthest behind its share."""
        total = sum(share.taken for share in self._shares) + 1
        weights = sum(share.weight for share in self._shares)
        return max(self._shares, key=lambda share: share.weight / weights * total - share.taken)


def build_train_and_eval(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    notes: list[str] | None = None,
    encoders: Mapping[int, Encoder] | None = None,
    given: GivenAnswers | None = None,
) -> tuple[PromptStream, list[Prompt]]:
    """Builds the stream of training prompts, and the held-out prompts, each with `answer_ids`.

    The held-out list is empty when evaluation is off or there are no gold answers. Held-out answers are cut to
    `rollout.max_new_tokens`, the length that training sees. `notes` gets lines on what was found otherwise than named.
    `encoders`: of teachers with another tokenizer, by their number. `given`: answers that are not sampled; where all
    are given, rows without one are left out.

    Raises:
        MissingPathError, DataError: see `read_rows` and `PromptDataset`.
    """
    rows = read_rows(config)
    if notes is not None:
        notes.extend(rows.notes)
    kept = rows.train
    if given is not None and config.data.on_policy_fraction == 0:
        kept = [row for row in rows.train if given.has(row)]
        if not kept:
            raise DataError(
                f"none of {len(rows.train)} prompts has an answer in data.answers={config.data.answers!r}: use the "
                "data of the run that saved them, or set data.on_policy_fraction above 0"
            )
        if notes is not None and len(kept) < len(rows.train):
            notes.append(f"{len(rows.train) - len(kept)} of {len(rows.train)} prompts have no answer and are left out")
    train = _dataset(config, tokenizer, kept, encoders)
    held_out: Iterable[Prompt] = _dataset(config, tokenizer, rows.held_out, encoders) if rows.held_out else ()
    weights = rows.weights if len(rows.weights) > 1 else None
    return PromptStream(train, config.rollout.prompts_per_step, config.seed, weights), list(held_out)


def _dataset(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, rows: list[Example], encoders: Mapping[int, Encoder] | None
) -> PromptDataset:
    data = config.data
    return PromptDataset(
        rows,
        tokenizer,
        template=data.template,
        system_prompt=data.system_prompt,
        template_kwargs=data.template_kwargs,
        max_prompt_tokens=data.max_prompt_tokens,
        drop_long=data.drop_long_prompts,
        max_answer_tokens=config.rollout.max_new_tokens,
        contexts=context_templates(config),
        encoders=encoders,
    )
