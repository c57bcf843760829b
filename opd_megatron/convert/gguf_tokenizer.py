"""A fast tokenizer rebuilt from GGUF metadata (byte-level BPE only)."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_megatron.errors import UnsupportedModelError, WeightsError

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
USER_DEFINED_TOKEN = 4


def build_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Builds the tokenizer described by `tokenizer.*` fields, chat template included.

    Raises:
        UnsupportedModelError: not byte-level BPE, or a pre-tokenizer that is not known here.
        WeightsError: a tokenizer field is missing.
    """
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise UnsupportedModelError(f"GGUF tokenizer model {model!r} is not supported: only byte-level BPE ('gpt2')")
    try:
        tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    except KeyError as error:
        raise WeightsError(f"the GGUF file lacks the field {error}: it cannot give a tokenizer") from None
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = _pre_tokenizer(fields.get("tokenizer.ggml.pre", "default"))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([_added(t, True) for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN])
    core.add_tokens([_added(t, False) for t, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=int(fields["llama.context_length"]),
        clean_up_tokenization_spaces=False,
        chat_template=fields.get("tokenizer.chat_template"),
        **_named_tokens(fields, tokens),
    )


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        # Every digit is a token of its own; without this step arithmetic text gets ids the model never saw.
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name == "gpt-2":
        return byte_level
    raise UnsupportedModelError(f"GGUF pre-tokenizer {name!r} is not supported: known are 'smollm' and 'gpt-2'")


def _named_tokens(fields: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    roles = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    ids = {role: fields.get(f"tokenizer.ggml.{key}") for role, key in roles.items()}
    return {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
