"""The chat template as a run uses it: with its system prompt and arguments, for prompts, ends of turns and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd_megatron.config import DataConfig
from opd_megatron.data.rows import Message
from opd_megatron.errors import ConfigError, DataError
from opd_megatron.system.reading import is_text

_MARKER = "opd-answer"
_TAKEN = ("conversation", "messages", "tokenize", "add_generation_prompt", "return_dict", "return_tensors")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Renders conversations. One for a whole run."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    """Put before conversations that have no system message of their own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the template is given beside the messages."""

    def __post_init__(self) -> None:
        """Raises ConfigError when an argument has a name of transformers' own, or the system prompt is no text."""
        taken = [name for name in self.arguments if name in _TAKEN]
        if taken:
            raise ConfigError(
                f"data.template_kwargs.{taken[0]} is set by the trainer itself: give arguments of the template only"
            )
        if self.system_prompt is not None and not is_text(self.system_prompt):
            raise ConfigError(f"data.system_prompt={self.system_prompt!a} is no text: correct it")

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> ChatTemplate:
        """Takes system prompt and arguments from the configuration."""
        return ChatTemplate(tokenizer, data.system_prompt, data.template_kwargs)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Renders a conversation with the assistant's turn opened.

        Raises:
            DataError: the tokenizer has no template, or the template refuses the messages.
        """
        try:
            return self._render(self._with_system(messages), opens=True)
        except ConfigError:
            raise
        except Exception as error:  # a template raises whatever its author chose
            raise self._refusal(messages, error) from None

    def end_of_turn_id(self) -> int | None:
        """Finds the special token that the template puts after an assistant's message; end of sequence where it puts
        none, and where there is no template."""
        eos = self.tokenizer.eos_token_id
        if not self.exists:
            return eos
        turn = [("user", "question"), ("assistant", _MARKER)]
        text = None
        for messages in (self._with_system(turn), [("system", "system"), *turn]):
            try:
                text = self._render(messages, opens=False)
                break
            except Exception:
                continue
        _, found, after = (text or "").rpartition(_MARKER)
        ids = self.tokenizer(after.lstrip(), add_special_tokens=False).input_ids if found else []
        if ids and ids[0] in self.tokenizer.all_special_ids + list(self.tokenizer.added_tokens_decoder):
            return ids[0]
        return eos

    @property
    def exists(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        own = any(role == "system" for role, _ in messages)
        return [*([] if own or self.system_prompt is None else [("system", self.system_prompt)]), *messages]

    def _render(self, messages: Sequence[Message], *, opens: bool) -> str:
        text: Any = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            add_generation_prompt=opens,
            tokenize=False,
            **self.arguments,
        )
        return text

    def _refusal(self, messages: Sequence[Message], error: Exception) -> DataError:
        """Explains by trying: what helps is the remedy."""
        name = self.tokenizer.name_or_path
        if not self.exists:
            return DataError(
                f"the tokenizer {name!r} has no chat template: set data.template=raw, or take a tokenizer that has one "
                "with student.tokenizer (the teacher's, where both are of one family)"
            )
        line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        if type(error).__name__ in ("TemplateSyntaxError", "TemplateAssertionError"):
            return DataError(
                f"the chat template of {name!r} is not valid Jinja ({line}): correct it, or set data.template=raw"
            )
        roles = "+".join(role for role, _ in self._with_system(messages))
        return DataError(f"the chat template of {name!r} refuses {roles} messages ({line}): {self._remedy(messages)}")

    def _remedy(self, messages: Sequence[Message]) -> str:
        without = [message for message in messages if message[0] != "system"]
        if len(without) < len(messages) and self._renders(without):
            return "leave the system messages out of the data, or set data.template=raw"
        if self.system_prompt is not None and self._renders(messages):
            return "drop data.system_prompt, or set data.template=raw"
        if self.system_prompt is None and self._renders([("system", "system"), *without]):
            return "it needs a system message, set data.system_prompt"
        return "set what it misses with data.template_kwargs, or data.template=raw"

    def _renders(self, messages: Sequence[Message]) -> bool:
        try:
            self._render(messages, opens=True)
        except Exception:
            return False
        return True
