"""Small tokenizers with merges, trained on the spot: byte-level BPE as GPT-2's, and SentencePiece that falls back to
bytes as Llama 2's."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = {
    "sums": [f"What is {n} plus {n + 1}? It is {2 * n + 1}. The answer is {n}." for n in range(200)],
    "words": [
        "the cat sat on the mat and the dog ran to the river where the water was cold",
        "It is what it is: seven plus eight is fifteen, and that is all there is to it.",
        "naïve café Ünïcode übergroß 数学 は楽しい математика 🙂🙃 e\u0301",
    ]
    * 20,
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)
END = "<end>"


def save_bpe_tokenizer(
    folder: str | Path, texts: str = "words", vocab_size: int = 400, *, sentencepiece: bool = False,
    specials: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:  # fmt: skip
    """Trains one, writes its files into `folder` and returns it. Its answers end with `END`."""
    listed = ["<begin>", END, *specials]
    if sentencepiece:
        core = Tokenizer(models.BPE(byte_fallback=True, unk_token=None, fuse_unk=False))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        core.decoder = decoders.Sequence([
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        ])  # fmt: skip
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*listed, *fallback], show_progress=False)
        core.train_from_iterator(TEXTS[texts], trainer)
        core = _without_special(core, fallback)
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=listed, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        core.train_from_iterator(TEXTS[texts], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<begin>",
        eos_token=END,
        pad_token=END,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        **({"additional_special_tokens": list(specials)} if specials else {}),
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _without_special(core: Tokenizer, names: list[str]) -> Tokenizer:
    """Makes tokens that the trainer took as special ordinary ones."""
    import json

    written = json.loads(core.to_str())
    written["added_tokens"] = [each for each in written["added_tokens"] if each["content"] not in names]
    found = Tokenizer.from_str(json.dumps(written))
    assert all(isinstance(token, AddedToken) for token in found.get_added_tokens_decoder().values())
    return found
