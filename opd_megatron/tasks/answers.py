"""Final answers in what a model wrote, and whether two of them are the same number or expression."""

from __future__ import annotations

import re

from math_verify import parse, verify

_NUMBER = re.compile(r"-?\$?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?(?:/\d+)?%?")
_NAMED = re.compile(r"(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s*", re.IGNORECASE)
HASHES = "####"


def after_hashes(text: str) -> str | None:
    """What stands behind the last `####`, as GSM8K writes its final answers."""
    if HASHES not in text:
        return None
    line = text.rpartition(HASHES)[2].strip().splitlines()
    return line[0].strip() if line else None


def in_box(text: str) -> str | None:
    r"""What is in the last \boxed{} or \fbox{}, braces matched; None where there is none or it does not end."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    opening = text.find("{", start)
    if opening < 0:
        return None
    depth = 0
    for place in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[opening + 1 : place].strip()
    return None


def last_number(text: str) -> str | None:
    """The last number in a text; behind the last `answer is` where there is one."""
    named = [match.end() for match in _NAMED.finditer(text)]
    for part in (text[named[-1] :] if named else "", text):
        found = _NUMBER.findall(part)
        if found:
            return found[0] if part is not text else found[-1]
    return None


def same(gold: str, answer: str) -> bool:
    """Whether two answers are the same, by math-verify: as numbers, sets, expressions, or text where it reads none."""
    plain = [_plain(each) for each in (gold, answer)]
    if plain[0] == plain[1]:
        return True
    parsed = [parse(f"${each}$") or parse(each) for each in plain]
    return bool(all(parsed) and verify(parsed[0], parsed[1]))


def _plain(answer: str) -> str:
    """Without thousands separators, currency and a full stop at the end."""
    answer = answer.strip().rstrip(".").replace("\\$", "").replace("$", "").strip()
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)
