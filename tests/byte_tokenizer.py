"""A real fast tokenizer that needs no download: one token a byte (id = byte value), ChatML special tokens, 272 ids."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 272
END_OF_TEXT, TURN_START, TURN_END = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_vocab() -> list[str]:
    """Token of every id, in byte-level BPE's alphabet."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = {byte: 256 + n for n, byte in enumerate(b for b in range(256) if b not in plain)}
    tokens = [chr(shifted.get(byte, byte)) for byte in range(256)]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    reserved = [f"<|reserved_{i}|>" for i in range(VOCAB_SIZE - len(tokens) - len(specials))]
    return tokens + specials + reserved


def save_byte_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Writes the tokenizer's files into `folder` and returns it."""
    vocab = byte_vocab()
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in vocab[256:]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
