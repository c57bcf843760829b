"""One sampled answer as text for the terminal."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from opd_megatron.types import Rollout


def readable_sample(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, *, max_chars: int = 600) -> str:
    """Formats question, the student's answer and the gold one (or the answer that was given), each cut to `max_chars`
    with its middle left out.

    Special tokens of the answer are shown: whether it ended by itself is worth seeing. Plain text, no markup.
    """
    given = rollout.policy_version < 0
    answer = tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=False)
    count = len(rollout.response_ids)
    nll = 0.0 if rollout.logprobs is None or not count else -float(rollout.logprobs.double().mean())
    sampled = f"policy {rollout.policy_version} | {count} tokens, {rollout.finish_reason} | {nll:.2f} nats/token"
    lines = [
        f"{rollout.prompt.id} | {f'given, {count} tokens' if given else sampled}",
        f"  question: {_trim(rollout.prompt.text, max_chars)}",
        f"  {'answer: ' if given else 'student:'}  {_trim(answer, max_chars)}",
    ]
    if not given and rollout.prompt.answer is not None:
        lines.append(f"  gold:     {_trim(rollout.prompt.answer, max_chars)}")
    return "\n".join(lines)


def _trim(text: str, limit: int) -> str:
    """Cuts to printable text of at most `limit` characters; later lines are indented."""
    clean = "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text.strip())
    if len(clean) > limit:
        head = limit * 2 // 3
        tail = max(limit - head - len(" [...] "), 0)
        clean = f"{clean[:head]} [...] {clean[len(clean) - tail :]}"
    return clean.replace("\n", "\n            ")
