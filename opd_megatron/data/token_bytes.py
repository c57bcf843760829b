"""The bytes of text that each token of a vocabulary stands for."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd_megatron.errors import TokenizerMismatchError

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"
"""What SentencePiece writes for a space."""


class TokenBytes:
    """Of one tokenizer: bytes of every token, and tokens of any bytes.

    Byte-level BPE (GPT-2, Llama 3, Qwen), and SentencePiece vocabularies with a fallback to bytes (Llama 2, Gemma,
    Mistral) or without.

    Raises:
        TokenizerMismatchError: its tokens do not stand for bytes of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _unreadable(name, "it has no tokenizer.json")
        from tokenizers import Tokenizer

        written = backend.to_str()
        self._encoder = Tokenizer.from_str(written)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._encoder.encode_special_tokens = True  # what looks like a special token is text here
        decode = _decoding(json.loads(written), name)
        if decode is _byte_level:
            self._encoder.normalizer = None  # composed letters would be other bytes; there are tokens for these too
        added = tokenizer.added_tokens_decoder
        self.of: dict[int, bytes] = {}
        """Id -> bytes, of tokens that stand for text."""
        self.special: dict[int, str] = {}
        """Id -> content, of tokens that stand for none."""
        for token, token_id in tokenizer.get_vocab().items():
            if token_id in added and added[token_id].special:
                self.special[token_id] = token
            else:
                self.of[token_id] = token.encode() if token_id in added else decode(token)
        self._singles = {value[0]: token_id for token_id, value in self.of.items() if len(value) == 1}
        self._check(name)

    def by_bytes(self) -> dict[bytes, int]:
        """The token of each byte string; of several the one that is a piece of text, not a fallback to bytes."""
        found: dict[bytes, int] = {}
        for token_id, value in sorted(self.of.items(), key=lambda item: (self._is_fallback(item[0]), item[0])):
            found.setdefault(value, token_id)
        return found

    def encode(self, data: bytes) -> tuple[list[int], list[int], bool]:
        """Cuts bytes into tokens: their ids, where each ends, and whether the bytes are all in them.

        What is no UTF-8 is written with tokens of single bytes; without those the tokens end before it.
        """
        ids: list[int] = []
        ends: list[int] = []
        done = 0
        for part in re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape")):
            if not part:
                continue
            raw = part.encode("utf-8", "surrogateescape")
            found = self._single_bytes(raw) if "\udc80" <= part[0] <= "\udcff" else self._of_text(part, raw)
            whole = sum(len(value) for _, value in found) == len(raw)
            for token_id, value in found:
                done += len(value)
                ids.append(token_id)
                ends.append(done)
            if not whole:
                return ids, ends, False
        return ids, ends, True

    def _of_text(self, text: str, raw: bytes) -> list[tuple[int, bytes]]:
        """Tokens of text, as far as they stand for its very bytes."""
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        values = [self.of.get(token_id, b"") for token_id in ids]
        joined = b"".join(values)
        if joined == b" " + raw and values:  # SentencePiece begins every text with a space of its own
            values[0] = values[0].removeprefix(b" ")
            if not values[0]:
                ids, values = ids[1:], values[1:]
            joined = raw
        found, done = [], 0
        for token_id, value in zip(ids, values, strict=True):
            if not value or raw[done : done + len(value)] != value:
                break
            found.append((token_id, value))
            done += len(value)
        return found

    def _single_bytes(self, raw: bytes) -> list[tuple[int, bytes]]:
        found = []
        for byte in raw:
            if byte not in self._singles:
                break
            found.append((self._singles[byte], bytes([byte])))
        return found

    def _is_fallback(self, token_id: int) -> bool:
        token = self._encoder.id_to_token(token_id)
        return token is not None and _FALLBACK.fullmatch(token) is not None

    def _check(self, name: str) -> None:
        sample = "Hello, world 42\n"
        ids, _, whole = self.encode(sample.encode())
        if not ids or not whole:
            raise _unreadable(name, f"{sample!r} does not come back from its tokens")


def _decoding(written: dict[str, Any], name: str) -> Any:
    """Finds out how a token is written, from tokenizer.json."""
    parts = json.dumps([written.get(key) for key in ("pre_tokenizer", "decoder", "normalizer")])
    if '"ByteLevel"' in parts:
        return _byte_level
    if '"Metaspace"' in parts or _SPACE in parts or "\\u2581" in parts:
        return _sentencepiece
    raise _unreadable(name, "it is neither byte-level BPE nor SentencePiece")


def _byte_level(token: str) -> bytes:
    table = _byte_of_letter()
    return bytes(table[letter] for letter in token) if all(letter in table for letter in token) else token.encode()


def _sentencepiece(token: str) -> bytes:
    fallback = _FALLBACK.fullmatch(token)
    return bytes([int(fallback[1], 16)]) if fallback else token.replace(_SPACE, " ").encode()


@cache
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: a printable letter for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _unreadable(name: str, why: str) -> TokenizerMismatchError:
    return TokenizerMismatchError(
        f"the bytes of the tokens of {name} cannot be told ({why}): teachers.N.alignment needs byte-level BPE or "
        "SentencePiece; use two models of one tokenizer family"
    )
