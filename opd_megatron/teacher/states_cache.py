"""A teacher's final hidden states on disk, found again by what was read.

    FOLDER/states-RANK-NUMBER.safetensors
        states   [rows, h]         of every response token, one sequence after the other
        keys     [n, 16] uint8     what was read: context and answer (`sequence_key`)
        answers  [n, 16] uint8     the answer alone, which tells another context from another answer
        ends     [n] int64         where each sequence's rows end
        metadata                   format, and the teacher's fingerprint

A shard is whole by the time it has its name, so that a pass that was interrupted leaves what it had finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opd_megatron.errors import TeacherError, one_line
from opd_megatron.system.atomic import flush, partial_path
from opd_megatron.types import Rollout

_FORMAT = "1"
_KEY_BYTES = 16


def sequence_key(rollout: Rollout) -> bytes:
    """What a sequence is to a teacher: the tokens of its context and of its answer."""
    context = np.asarray(rollout.prompt.token_ids, dtype=np.int64)
    return sha256(len(context).to_bytes(8, "little") + context.tobytes() + _bytes_of(rollout)).digest()[:_KEY_BYTES]


def answer_key(rollout: Rollout) -> bytes:
    """The same for its answer alone."""
    return sha256(_bytes_of(rollout)).digest()[:_KEY_BYTES]


def _bytes_of(rollout: Rollout) -> bytes:
    return rollout.response_ids.to(torch.int64).numpy().tobytes()


def shards_of(folder: Path) -> list[Path]:
    """Whole shards, in an order that every rank finds."""
    return sorted(folder.glob("states-*.safetensors"))


@dataclass(frozen=True, slots=True)
class _Place:
    shard: int
    begin: int
    end: int


class StatesCache:
    """What lies in a folder; shards that are written later are not seen."""

    def __init__(self, folder: Path, *, fingerprint: str | None, width: int, name: str) -> None:
        """
        Args:
            fingerprint: what the teacher must be; None where anything will do.
            width: of its hidden states.
            name: of the teacher, for errors.

        Raises:
            TeacherError: a shard is damaged, or another teacher's.
        """
        self.folder, self._name = folder, name
        self._shards: list[Any] = []
        self._files = shards_of(folder)
        self._places: dict[bytes, _Place] = {}
        self._answers: set[bytes] = set()
        self.dtype: torch.dtype | None = None
        """Of the states; None where there are none."""
        for file in self._files:
            self._read(file, fingerprint, width)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def has_answer(self, key: bytes) -> bool:
        """Whether there is such an answer to any context."""
        return key in self._answers

    def states(self, key: bytes) -> torch.Tensor:
        """[n, h] of a sequence's answer. Raises TeacherError when its file cannot be read any more."""
        place = self._places[key]
        try:
            rows: torch.Tensor = self._shards[place.shard].get_slice("states")[place.begin : place.end]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise self._damaged(self._files[place.shard], error) from None
        return rows

    def digest(self) -> str:
        """Hashes which sequences there are."""
        return sha256(b"".join(sorted(self._places))).hexdigest()

    def _read(self, file: Path, fingerprint: str | None, width: int) -> None:
        try:
            shard = safe_open(file, framework="pt")
            described = dict(shard.metadata() or {})
            keys, answers = (shard.get_tensor(name).numpy() for name in ("keys", "answers"))
            ends = shard.get_tensor("ends").tolist()
            states = shard.get_slice("states")
            rows, columns = states.get_shape()
            if len(keys) != len(ends) or len(answers) != len(ends) or (ends and ends[-1] != rows):
                raise ValueError(f"{len(keys)} keys for {len(ends)} sequences of {rows} rows")
            dtype = states[0:0].dtype
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(file, error) from None
        if described.get("format") != _FORMAT:
            raise TeacherError(
                f"{str(file)!r} has format {described.get('format')!r} where {_FORMAT!r} is read: remove the folder "
                "and run `opd-megatron cache-teacher` again"
            )
        if fingerprint is not None and described.get("fingerprint") != fingerprint:
            raise TeacherError(
                f"{str(self.folder)!r} holds hidden states of {described.get('teacher')!r} with fingerprint "
                f"{described.get('fingerprint')}, teacher {self._name} has {fingerprint}: name that teacher's folder, "
                "or an empty one for `opd-megatron cache-teacher` to fill"
            )
        if columns != width:
            raise self._damaged(file, ValueError(f"states of width {columns}, the teacher's is {width}"))
        self.dtype = dtype
        begins = [0, *ends[:-1]]
        for key, answer, begin, end in zip(keys, answers, begins, ends, strict=True):
            self._places[key.tobytes()] = _Place(len(self._shards), begin, end)
            self._answers.add(answer.tobytes())
        self._shards.append(shard)

    @staticmethod
    def _damaged(file: Path, error: BaseException) -> TeacherError:
        return TeacherError(
            f"{str(file)!r} is no shard of cached hidden states, or damaged ({one_line(error)}): remove it and run "
            "`opd-megatron cache-teacher` again, which keeps the others"
        )


class CacheWriter:
    """One rank's shards. Numbers go on from those that the folder has."""

    def __init__(self, folder: Path, rank: int, described: Mapping[str, str], shard_bytes: int) -> None:
        """`described`: `fingerprint` and `teacher`, which every shard says of its teacher."""
        self._folder, self._rank, self._shard_bytes = folder, rank, shard_bytes
        self._described = {"format": _FORMAT, **described}
        numbers = [int(file.stem.rpartition("-")[2]) for file in folder.glob(f"states-{rank:05d}-*.safetensors")]
        self._number = max(numbers, default=-1) + 1
        self._rows: list[torch.Tensor] = []
        self._sequences: list[Rollout] = []
        self._held = 0
        self._written: set[bytes] = set()
        self.tokens = self.nbytes = 0

    def __len__(self) -> int:
        return len(self._written)

    def add(self, rollouts: Sequence[Rollout], states: torch.Tensor) -> None:
        """Takes the states [T, h] of several sequences, one after the other; writes a shard when it is full."""
        for rollout, rows in zip(rollouts, states.split([len(each.response_ids) for each in rollouts]), strict=True):
            key = sequence_key(rollout)
            if key in self._written:
                continue
            self._written.add(key)
            self._sequences.append(rollout)
            self._rows.append(rows.cpu())
            self._held += rows.nbytes
            self.tokens, self.nbytes = self.tokens + len(rows), self.nbytes + rows.nbytes
            if self._held >= self._shard_bytes:
                self.flush()

    def flush(self) -> None:
        """Writes what is held. Raises OSError."""
        if not self._sequences:
            return
        tensors = {
            "states": torch.cat(self._rows).contiguous(),
            "keys": _stacked([sequence_key(each) for each in self._sequences]),
            "answers": _stacked([answer_key(each) for each in self._sequences]),
            "ends": torch.tensor([len(rows) for rows in self._rows]).cumsum(0),
        }
        path = self._folder / f"states-{self._rank:05d}-{self._number:05d}.safetensors"
        partial = partial_path(path)
        save_file(tensors, partial, metadata=self._described)
        flush(partial)
        partial.replace(path)
        flush(self._folder)
        self._number += 1
        self._rows, self._sequences, self._held = [], [], 0


def remove_partial(folder: Path) -> None:
    """Removes what a pass that was killed left half written."""
    for file in folder.glob(".states-*.partial"):
        file.unlink(missing_ok=True)


def _stacked(keys: Sequence[bytes]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, _KEY_BYTES).copy())
