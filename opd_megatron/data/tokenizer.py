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
    """Raises TokenizerMismatchError unless every token id means the same to both. Ids that a maker reserved may be
    missing in one, or have a name in a later release of it; returns what was let pass so, in words.

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
