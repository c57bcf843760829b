"""Rows to the tokens that a model of one tokenizer reads."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from opd_megatron.config import DataConfig
from opd_megatron.data.rows import Example
from opd_megatron.data.template import ChatTemplate
from opd_megatron.errors import DataError


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer and its chat template, or none to continue the text as it stands."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    system_prompt: str | None = None

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Encoder:
        """Takes template, system prompt and arguments from the configuration."""
        template = ChatTemplate.of(tokenizer, data) if data.template == "chat" else None
        return Encoder(tokenizer, template, data.system_prompt)

    @property
    def end_of_turn(self) -> int | None:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id if self.template is None else self.template.end_of_turn_id()

    def prompt(self, row: Example) -> tuple[int, ...]:
        """Encodes a question up to where its answer begins. Raises DataError."""
        if self.template is not None:
            text = self.template.prompt(row.messages or [("user", row.question)])
            return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)  # the template wrote them already
        if row.messages:
            raise DataError(f"prompt {row.id!r} is a list of messages, data.template=raw takes text: set it to chat")
        text = row.question if self.system_prompt is None else f"{self.system_prompt}\n\n{row.question}"
        ids = list(self.tokenizer(text).input_ids)
        eos = self.tokenizer.eos_token_id
        # Some tokenizers close every text. The student would continue after its own end.
        while len(ids) > 1 and ids[-1] == eos and not text.endswith(str(self.tokenizer.eos_token)):
            ids.pop()
        return tuple(ids)

    def most_tokens(self, row: Example, around: int) -> int:
        """Tokens of a row, at most: one is a byte at least. `around`: from `tokens_around`."""
        texts = [content for _, content in row.messages] or [row.question]
        return sum(len(text.encode("utf-8", "surrogatepass")) + around for text in texts)

    def tokens_around(self) -> int:
        """Tokens that the template puts around a text, at most."""
        return len(self.prompt(Example("", "?"))) + 16  # BPE may merge differently at the template boundary
