"""Two tokenizations of the same answer, laid side by side by its bytes.

    student   |The| cat| sat|...        ends at    3   7  11
    teacher   |Th|e cat| s|at|...                 2   7   9  11

Where both have an end, what came before is the same text: the tokens between two such places are a *span* (`The| cat`
against `Th|e cat`), whose log-probability both models give; and the two next tokens are distributions after the same
text, which can be compared token by token where both have the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from opd_megatron.data.token_bytes import TokenBytes
from opd_megatron.errors import TokenizerMismatchError
from opd_megatron.types import AlignedTokens

UNALIGNED = -1


@dataclass(frozen=True, slots=True)
class Translation:
    """An answer of n student tokens in m tokens of the teacher."""

    ids: list[int]
    """[m] the teacher's, one at least."""
    rows: np.ndarray
    """[n] int64: the teacher's token that begins where the student's begins, after the same text; -1 for none."""
    spans: np.ndarray
    """[n] int64: the span of each of the student's tokens, from 0; -1 where the teacher has none for its text."""
    of_teacher: np.ndarray
    """[m] int64: the span of each of the teacher's tokens."""


class TokenizerPair:
    """What is needed to lay a student's answers beside their translations.

    Args:
        stops: tokens that end an answer of the student's.
        ends: the token that ends an answer in each one's chat template.
        names: of student and teacher, for errors.

    Raises:
        TokenizerMismatchError: a tokenizer whose tokens stand for no bytes, or two without a token in common.
    """

    def __init__(
        self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, stops: Sequence[int],
        ends: tuple[int | None, int | None], names: tuple[str, str] = ("student", "teacher"),
    ) -> None:  # fmt: skip
        self._student, self._teacher = TokenBytes(student, names[0]), TokenBytes(teacher, names[1])
        self._stops, self._end = frozenset(stops), ends[1]
        self._specials = self._paired_specials(ends)
        if not self.shared[0]:
            raise TokenizerMismatchError(
                f"the tokenizers of {names[0]} and {names[1]} have no token in common: take another teacher"
            )

    @cached_property
    def shared(self) -> tuple[list[int], list[int]]:
        """Tokens that stand for the same bytes, and special tokens of the same meaning: ids of the student, rising, and
        the teacher's of each. A token is in one pair at most."""
        theirs = self._teacher.by_bytes()
        pairs = {mine: theirs[value] for value, mine in self._student.by_bytes().items() if value and value in theirs}
        pairs |= self._specials
        ordered = sorted(pairs.items())
        return [mine for mine, _ in ordered], [other for _, other in ordered]

    def translated(self, response_ids: Sequence[int], room: int | None = None) -> Translation:
        """Writes an answer in the teacher's tokens, at most `room` of them.

        What has no place in both (half a character at a cut, bytes that the teacher has no tokens for) is unaligned,
        and the teacher's answer ends before it. A special token that the teacher does not have is read as its text.
        """
        ends, pieces = self._cut(response_ids)
        ids: list[int] = []
        ends_of_teacher: list[int] = []
        done = 0
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
                done += 1
                ends_of_teacher.append(done)
                continue
            found, places, whole = self._teacher.encode(piece)
            ids.extend(found)
            ends_of_teacher.extend(done + place for place in places)
            done += len(piece)
            if not whole:
                break
        return _laid_side_by_side(ends, ids[:room], ends_of_teacher[:room], self._end or 0)

    def _cut(self, response_ids: Sequence[int]) -> tuple[list[int], list[bytes | int]]:
        """Ends of the student's tokens, a special one counting as one byte, and the answer as bytes and special tokens
        of the teacher."""
        ends: list[int] = []
        pieces: list[bytes | int] = []
        text, done = b"", 0
        last = len(response_ids) - 1
        for place, token_id in enumerate(response_ids):
            special = self._specials.get(token_id)
            if special is None and place == last and token_id in self._stops:
                special = self._end
            if special is not None:
                pieces.extend([text, special] if text else [special])
                text, done = b"", done + 1
            else:
                value = self._student.of.get(token_id)
                value = self._student.special.get(token_id, "").encode() if value is None else value
                text, done = text + value, done + len(value)
            ends.append(done)
        if text:
            pieces.append(text[: len(text) - _half_a_character(text)])
        return ends, pieces

    def _paired_specials(self, ends: tuple[int | None, int | None]) -> dict[int, int]:
        theirs = {content: token_id for token_id, content in self._teacher.special.items()}
        pairs = {
            mine: theirs[content] for mine, content in self._student.special.items() if content in theirs
        }  # fmt: skip
        mine, other = ends
        if mine is not None and other is not None and mine in self._student.special and other in self._teacher.special:
            pairs = {key: value for key, value in pairs.items() if value != other}
            pairs[mine] = other
        return pairs


def _laid_side_by_side(ends: Sequence[int], ids: list[int], ends_of_teacher: Sequence[int], filler: int) -> Translation:
    student, teacher = np.asarray(ends, dtype=np.int64), np.asarray(ends_of_teacher, dtype=np.int64)
    if not ids:
        nothing = np.full(len(student), UNALIGNED, dtype=np.int64)
        return Translation([filler], nothing, nothing, np.full(1, UNALIGNED, dtype=np.int64))
    begins = np.concatenate([[0], student[:-1]])
    begin_of_teacher: dict[int, int] = {}
    for place, begin in enumerate([0, *teacher[:-1].tolist()]):
        begin_of_teacher.setdefault(begin, place)
    rows = np.asarray([begin_of_teacher.get(int(begin), UNALIGNED) for begin in begins], dtype=np.int64)
    common = np.intersect1d(student, teacher)

    def spans_of(places: np.ndarray) -> np.ndarray:
        found = np.searchsorted(common, places, side="left")
        return np.where(found < len(common), found, UNALIGNED)

    return Translation(ids, rows, spans_of(student), spans_of(teacher))


def _half_a_character(data: bytes) -> int:
    """Bytes at the end that begin a character of UTF-8 and do not end it."""
    for length in range(1, min(3, len(data)) + 1):
        first = data[-length]
        if first >= 0xC2:
            wanted = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
            return length if wanted > length and first < 0xF5 else 0
        if first < 0x80:
            return 0
    return 0


def aligned_tokens(translations: Sequence[Translation], device: torch.device) -> AlignedTokens:
    """Puts the answers of a micro batch one after another."""
    rows, spans, of_rows = [], [], []
    first_row = first_span = 0
    for each in translations:
        rows.append(np.where(each.rows == UNALIGNED, UNALIGNED, each.rows + first_row))
        spans.append(np.where(each.spans == UNALIGNED, UNALIGNED, each.spans + first_span))
        of_rows.append(np.where(each.of_teacher == UNALIGNED, UNALIGNED, each.of_teacher + first_span))
        first_row += len(each.ids)
        first_span += 1 + max(each.spans.max(initial=UNALIGNED), each.of_teacher.max(initial=UNALIGNED))
    ids = [np.asarray(each.ids, dtype=np.int64) for each in translations]
    parts = (np.concatenate(part) for part in (rows, spans, of_rows, ids))
    return AlignedTokens(*(torch.from_numpy(part).to(device) for part in parts))
