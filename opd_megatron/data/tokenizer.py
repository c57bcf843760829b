"""Loading tokenizers, checking that two of them mean the same, and collecting what ends an answer."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opd_megatron.data.template import ChatTemplate
from opd_megatron.errors import ConfigError, MissingPathError, TokenizerMismatchError
from opd_megatron.system.reading import read_json_object

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# Names that model makers give to ids kept free for later; a model never saw them and a missing one costs nothing.
_PADDING_TOKEN = re.compile(r"(reserved|unused|extra_?id|placeholder|dummy|padding|^<\|?pad\|?>$|^\[pad\d*\]$)", re.I)


_SPECIAL = re.compile(r"^<[^\s<>]+>$|^\[[A-Z_0-9]+\]$")
"""How the names of special tokens look."""


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
    *,
    allow_missing: bool = False,
) -> list[str]:
    """Compares what every token id means to both. An id that its maker reserved may be missing in one, or have got a
    name in a later release; returns notes on names that one has and the other does not.

    Args:
        allow_missing: let special tokens pass that one of them lacks.

    Raises:
        TokenizerMismatchError: names the first id that differs and what it means to each.
    """
    ours, theirs = _tokens_by_id(student), _tokens_by_id(teacher)
    named = []
    for token_id in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(token_id), theirs.get(token_id)
        if mine == other:
            continue
        if _is_reserved(mine) and _is_reserved(other):
            continue
        lacks = allow_missing and None in (mine, other) and _SPECIAL.search(mine or other or "") is not None
        if lacks or _is_later_name(mine, other) or _is_later_name(other, mine):
            named.append(token_id)
            continue
        raise TokenizerMismatchError(
            f"token id {token_id} is {_meaning(mine)} to the student ({student_path}) but {_meaning(other)} to the "
            f"teacher ({teacher_path}): distillation compares distributions id by id, so use two models of one "
            f"tokenizer family ({len(ours)} and {len(theirs)} tokens), or set teachers.N.alignment (docs/teachers.md)"
            + (
                "; where it is a special token that does not matter, set data.allow_missing_tokens=true"
                if None in (mine, other) and _SPECIAL.search(mine or other or "")
                else ""
            )
        )
    if not named:
        return []
    first = named[0]
    return [
        f"token id {first} is {_meaning(ours.get(first))} to the student and {_meaning(theirs.get(first))} to the "
        f"teacher {teacher_path}"
        + (f", and {len(named) - 1} more so" if len(named) > 1 else "")
        + ": one release named what another kept free, which is let pass"
    ]


def _is_reserved(token: str | None) -> bool:
    return token is None or _PADDING_TOKEN.search(token) is not None


def _is_later_name(reserved: str | None, token: str | None) -> bool:
    """Whether one has an id free, by name, that is a special token to the other."""
    return reserved is not None and _is_reserved(reserved) and token is not None and _SPECIAL.search(token) is not None


def stop_token_ids(template: ChatTemplate, model_dir: str | Path | None = None) -> tuple[int, ...]:
    """Collects the ids that end an answer, ascending: the tokenizer's end of sequence, those in the model's
    generation_config.json, and the chat template's end of turn.

    Raises:
        ConfigError: generation_config.json is damaged, or names something that is no token id.
    """
    ids = {template.tokenizer.eos_token_id, template.end_of_turn_id()}
    path = Path(model_dir) / "generation_config.json" if model_dir is not None else None
    if path is not None and path.is_file():
        remedy = "download it again, or remove it where the tokenizer's own end of sequence is enough"
        listed = read_json_object(path, ConfigError, remedy).get("eos_token_id")
        found = listed if isinstance(listed, list) else [listed]
        wrong = [item for item in found if item is not None and (isinstance(item, bool) or not isinstance(item, int))]
        if wrong:
            raise ConfigError(f"{str(path)!r} has eos_token_id {wrong[0]!r}, which is no token id: {remedy}")
        ids.update(found)
    return tuple(sorted(int(i) for i in ids if i is not None))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hashes what every id means, and the chat template."""
    digest = sha256(repr(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])).encode("utf-8", "replace"))
    digest.update(repr(getattr(tokenizer, "chat_template", None)).encode("utf-8", "replace"))
    return digest.hexdigest()[:32]


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _meaning(token: str | None) -> str:
    return "unknown" if token is None else repr(token)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
