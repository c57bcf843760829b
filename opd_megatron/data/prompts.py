"""Rows to prompts: chat template, length limit, gold answers as tokens, and an endless stream that can resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from opd_megatron.config import RunConfig
from opd_megatron.data.sources import Example, train_and_eval_rows
from opd_megatron.data.tokenizer import end_of_turn_id, render_chat
from opd_megatron.errors import CheckpointError, DataError
from opd_megatron.types import Prompt


class PromptDataset:
    """Prompts, tokenized when they are asked for.

    A token is at least one byte of text, so only rows with more bytes than `max_prompt_tokens` are tokenized up
    front, to find those that are too long before training starts rather than in the middle of it.

    Args:
        template: `chat` or `raw`.
        max_prompt_tokens: limit for a prompt, template included; None for no limit.
        drop_long: leave rows over the limit out (`dropped` counts them) instead of raising.
        max_answer_tokens: `answer_ids` are cut to this length.

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
        max_prompt_tokens: int | None = None,
        drop_long: bool = False,
        max_answer_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.system_prompt = system_prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self.dropped = 0
        self._end_of_turn = end_of_turn_id(tokenizer) if template == "chat" else tokenizer.eos_token_id
        self._rows = list(rows)
        if not self._rows:
            raise DataError("the data set has no rows: give a data.source that has some")
        self._check_lengths(drop_long)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        row = self._rows[index]
        token_ids = self._encode(row.question)
        if self._is_long(len(token_ids)):
            raise self._too_long(row, len(token_ids))
        answer_ids = None if row.answer is None else self._encode_answer(row.answer)
        return Prompt(row.id, token_ids, row.question, row.answer, answer_ids)

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def _encode(self, question: str) -> tuple[int, ...]:
        if self.template == "raw":
            text = question if self.system_prompt is None else f"{self.system_prompt}\n\n{question}"
            return tuple(self.tokenizer(text).input_ids)
        messages = [{"role": "user", "content": question}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        text = render_chat(self.tokenizer, messages, add_generation_prompt=True)
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)  # the template wrote them already

    def _encode_answer(self, answer: str) -> tuple[int, ...]:
        ids = list(self.tokenizer(answer, add_special_tokens=False).input_ids)
        if self._end_of_turn is not None:
            ids.append(self._end_of_turn)
        return tuple(ids[: self.max_answer_tokens])

    def _is_long(self, length: int) -> bool:
        return self.max_prompt_tokens is not None and length > self.max_prompt_tokens

    def _check_lengths(self, drop: bool) -> None:
        around = len(self._encode("?")) + 16  # BPE may merge differently at the template boundary
        kept = []
        for row in self._rows:
            suspect = self._is_long(len(row.question.encode("utf-8", "surrogatepass")) + around)
            length = len(self._encode(row.question)) if suspect else 0
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


class PromptStream:
    """Prompts for one step after the other, shuffled anew each epoch; the same on every rank.

    The order of epoch e depends on (seed, e) alone, so the cursor of two numbers is all that a resume needs. A
    step that reaches the end of an epoch is filled from the next one.
    """

    def __init__(self, dataset: PromptDataset, prompts_per_step: int, seed: int) -> None:
        self.dataset = dataset
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._order = self._shuffle()

    def next_prompts(self) -> list[Prompt]:
        """Takes the next `prompts_per_step` prompts."""
        indices: list[int] = []
        while len(indices) < self.prompts_per_step:
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffle()
            taken = self._order[self.position :][: self.prompts_per_step - len(indices)]
            self.position += len(taken)
            indices.extend(int(index) for index in taken)
        return [self.dataset[index] for index in indices]

    def state_dict(self) -> dict[str, int]:
        """Returns the data cursor, with the data set and seed that it is valid for."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "rows": len(self.dataset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken. Raises CheckpointError when data set or seed are others."""
        for name, mine in (("rows", len(self.dataset)), ("seed", self.seed)):
            if int(state[name]) != mine:
                raise CheckpointError(
                    f"the checkpoint's data cursor is for {name}={int(state[name])}, this run has {mine}: restore "
                    "data and seed of that run, or start in another output_dir"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))


def build_train_and_eval(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptStream, list[Prompt]]:
    """Builds the stream of training prompts, and the held-out prompts, each with `answer_ids`.

    The held-out list is empty when evaluation is off or there are no gold answers. Held-out answers are cut to
    `rollout.max_new_tokens`, the length that training sees.

    Raises:
        MissingPathError, DataError: see `train_and_eval_rows` and `PromptDataset`.
    """
    data = config.data
    train_rows, eval_rows = train_and_eval_rows(config)
    train, held_out = (
        PromptDataset(
            rows,
            tokenizer,
            template=data.template,
            system_prompt=data.system_prompt,
            max_prompt_tokens=data.max_prompt_tokens,
            drop_long=data.drop_long_prompts,
            max_answer_tokens=config.rollout.max_new_tokens,
        )
        if rows
        else None
        for rows in (train_rows, eval_rows)
    )
    assert train is not None
    return PromptStream(train, config.rollout.prompts_per_step, config.seed), list(held_out or [])
