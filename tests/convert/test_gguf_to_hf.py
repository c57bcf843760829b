import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opd_megatron.convert.gguf import LAYER_NAMES, convert_gguf
from opd_megatron.errors import MissingPathError, UnsupportedModelError, WeightsError
from tests.byte_tokenizer import CHAT_TEMPLATE, byte_vocab
from tests.tools.scripts import load_script

HEADS, KV_HEADS, LAYERS = 4, 2, 2
REAL_FILE = Path(os.environ.get("OPD_SMOLLM2_GGUF", "runs/assets/cache/SmolLM2-135M-Instruct.Q4_1.gguf"))


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_vocab()), hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # large enough that a wrong row order shows in the logits
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row r of a head of size d moves to 2 r (first half) or 2 (r - d/2) + 1 (second half)."""
    size = len(weight) // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for row in range(size):
            place = 2 * row if row < size // 2 else 2 * (row - size // 2) + 1
            out[head * size + place] = weight[head * size + row]
    return out


def write_gguf(path, model, *, arch="llama", pre="smollm", quantize=None, skip=()):
    writer = gguf.GGUFWriter(path, arch)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, pre)
    for name, values in gguf_tensors(model):
        if name in skip:
            continue
        kind = quantize if quantize is not None and values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, pre):
    vocab = byte_vocab()
    tokens = [*vocab[256:270], *vocab[:256], "12", "ab"]  # specials first, as in the real file; merged ones last
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 14 + [gguf.TokenType.NORMAL] * 258)
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def gguf_tensors(model):
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    if not model.config.tie_word_embeddings:
        yield "output.weight", state["lm_head.weight"]
    for layer in range(LAYERS):
        for theirs, ours in LAYER_NAMES.items():
            values = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                values = llama_cpp_order(values, HEADS if theirs == "attn_q" else KV_HEADS)
            yield f"blk.{layer}.{theirs}.weight", values


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_model_gives_the_logits_of_the_model_the_file_was_made_from(tmp_path, tied):
    model = tiny_llama(tied)
    out = convert_gguf(write_gguf(tmp_path / "m.gguf", model), tmp_path / "hf", dtype="fp32")
    back = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(0, 272, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits)
    assert back.config.tie_word_embeddings is tied
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 5000.0


def test_quantised_tensors_equal_those_that_transformers_reads_from_the_same_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(True), quantize=gguf.GGMLQuantizationType.Q8_0)
    ours = AutoModelForCausalLM.from_pretrained(convert_gguf(path, tmp_path / "hf", dtype="fp32"), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)


def test_the_rebuilt_tokenizer_splits_digits_keeps_specials_whole_and_round_trips_text(tmp_path):
    out = convert_gguf(write_gguf(tmp_path / "m.gguf", tiny_llama(True)), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("ab 12") == ["ab", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("déjà 12\n")) == "déjà 12\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "1"}], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(turn, add_special_tokens=False).input_ids
    assert ids[0] == 1
    assert ids.count(2) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("user\n1")


def test_a_failed_conversion_leaves_no_folder_and_a_full_folder_is_refused(tmp_path):
    path = write_gguf(tmp_path / "short.gguf", tiny_llama(True), skip=("blk.1.attn_v.weight",))
    with pytest.raises(WeightsError, match=r"lacks 1 tensors, first 'model\.layers\.1\.self_attn\.v_proj\.weight'"):
        convert_gguf(path, tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("mine")
    with pytest.raises(WeightsError, match="not an empty folder"):
        convert_gguf(write_gguf(tmp_path / "m.gguf", tiny_llama(True)), tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "m.gguf", "short.gguf"]
    assert (tmp_path / "full" / "keep").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "said"),
    [({"arch": "qwen2"}, "architecture 'qwen2'"), ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe'")],
)
def test_what_the_converter_does_not_know_is_refused_by_name(tmp_path, change, said):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(True), **change)
    with pytest.raises(UnsupportedModelError, match=said):
        convert_gguf(path, tmp_path / "hf")


def test_the_command_names_a_missing_or_damaged_file_in_one_line_and_exits_with_2(tmp_path, capsys):
    main = load_script("checkpoint_convert/gguf_to_hf.py").main
    assert main(["--gguf", str(tmp_path / "none.gguf"), "--out", str(tmp_path / "hf")]) == 2
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really, or not for long")
    assert main(["--gguf", str(tmp_path / "bad.gguf"), "--out", str(tmp_path / "hf")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "does not exist" in lines[0]
    assert "not a readable GGUF" in lines[1]
    with pytest.raises(MissingPathError):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "hf")


@pytest.mark.slow
@pytest.mark.skipif(not REAL_FILE.is_file(), reason=f"{REAL_FILE} is absent: make demo fetches it")
def test_the_real_model_adds_and_its_tensors_equal_transformers_own_reading(tmp_path):
    out = convert_gguf(REAL_FILE, tmp_path / "hf", dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+3?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**turn, max_new_tokens=20, do_sample=False)[0, turn["input_ids"].shape[1] :]
    assert "5" in tokenizer.decode(answer)
    theirs = AutoModelForCausalLM.from_pretrained(REAL_FILE.parent, gguf_file=REAL_FILE.name, dtype=torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
