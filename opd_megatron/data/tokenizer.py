"""Loading tokenizers, checking that two of them mean the same, and finding where a turn ends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opd_megatron.errors import DataError, MissingPathError, TokenizerMismatchError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# Names that model makers give to ids kept free for later; a model never saw them and a missing one costs nothing.
_PADDING_TOKEN = re.compile(r"(reserved|unused|extra_?id|placeholder|dummy|padding|^<\|?pad\|?>$|^\[pad\d*\]$)", re.I)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face folder or hub id.

    Raises:
        MissingPathError: there is none, or it cannot be read.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise MissingPathError(
            f"folder {str(path)!r} holds no tokenizer ({TOKENIZER_FILES[0]}): copy the model's tokenizer files into it"
        )
    # What cannot be a hub id must not wait for the network's time-outs.
    if not folder.is_dir() and (folder.is_absolute() or str(path).count("/") > 1 or str(path).startswith(".")):
        raise MissingPathError(f"tokenizer folder {str(path)!r} does not exist: give a Hugging Face folder or hub id")
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises a dozen types here, down to the network's
        hint = "set trust_remote_code=true if you have read its code" if "trust_remote_code" in str(error) else (
            "give an existing Hugging Face folder, or a hub id that can be reached from here"
        )  # fmt: skip
        raise MissingPathError(f"cannot load a tokenizer from {str(path)!r} ({_first_line(error)}): {hint}") from None


def check_same_tokenizer(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_path: str = "student",
    teacher_path: str = "teacher",
) -> None:
    """Raises TokenizerMismatchError unless every token id means the same to both; reserved ids may be missing in one.

    Raises:
        TokenizerMismatchError: names the first id that differs and what it means to each.
    """
    ours, theirs = _tokens_by_id(student), _tokens_by_id(teacher)
    for token_id in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(token_id), theirs.get(token_id)
        if mine == other or (None in (mine, other) and _PADDING_TOKEN.search(mine or other or "")):
            continue
        raise TokenizerMismatchError(
            f"token id {token_id} is {_meaning(mine)} to the student ({student_path}) but {_meaning(other)} to the "
            f"teacher ({teacher_path}): distillation compares distributions id by id, so use two models of one "
            f"tokenizer family ({len(ours)} and {len(theirs)} tokens)"
        )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_dir: str | Path | None = None) -> tuple[int, ...]:
    """Collects the ids that end an answer, ascending: the tokenizer's end of sequence, those in the model's
    generation_config.json, and the chat template's end of turn.
    """
    ids = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    path = Path(model_dir) / "generation_config.json" if model_dir is not None else None
    if path is not None and path.is_file():
        listed = json.loads(path.read_text()).get("eos_token_id")
        ids.update(listed if isinstance(listed, list) else [listed])
    return tuple(sorted(int(i) for i in ids if i is not None))


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Finds the special token that the chat template puts after an assistant's message; end of sequence without one."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.eos_token_id
    marker = "opd-answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": marker}]
    _, found, after = render_chat(tokenizer, messages, add_generation_prompt=False).rpartition(marker)
    ids = tokenizer(after.lstrip(), add_special_tokens=False).input_ids if found else []
    if ids and ids[0] in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder):
        return ids[0]
    return tokenizer.eos_token_id


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool
) -> str:
    """Renders the chat as text. Raises DataError when the tokenizer has no template or the template refuses the
    messages."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template: set data.template=raw, or use an "
            "instruction-tuned model"
        )
    try:
        text: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # a template raises whatever its author chose
        roles = "+".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} refuses {roles} messages ({_first_line(error)}): drop "
            "data.system_prompt or set data.template=raw"
        ) from None
    return text


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _meaning(token: str | None) -> str:
    return "unknown" if token is None else repr(token)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
