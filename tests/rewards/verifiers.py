"""A score that varies over what an untrained model writes."""

from __future__ import annotations

from typing import Any


def even(answer: str, row: Any) -> float:
    assert row["answer"].startswith("It is ")
    return sum(letter.isalpha() for letter in answer) % 4 / 3
