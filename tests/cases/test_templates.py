"""Chat templates as users have them: ones that need a system message, take arguments, refuse, or are broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_megatron import cli
from opd_megatron.config import load_config
from opd_megatron.data.prompts import build_train_and_eval
from opd_megatron.data.template import ChatTemplate
from opd_megatron.data.tokenizer import load_tokenizer, stop_token_ids
from tests.byte_tokenizer import CHAT_TEMPLATE, TURN_END
from tests.cases.inputs import make_pair, refused, train_words, write_rows

NEEDS_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message has to come first') }}{% endif %}"
    + CHAT_TEMPLATE
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% endfor %}" + CHAT_TEMPLATE
)
THINKS = CHAT_TEMPLATE + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think></think>' }}{% endif %}"
)
NEEDS_ARGUMENT = CHAT_TEMPLATE + "{{ tools_of[style] }}"


def pair_with(folder: Path, template: str) -> None:
    make_pair(folder)
    for name in ("student", "teacher"):
        tokenizer = load_tokenizer(folder / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        (NEEDS_SYSTEM, ["data.system_prompt=Add."]),
        (NO_SYSTEM, []),
        (NO_SYSTEM, ["data.system_prompt=Add.", "data.template=raw"]),
        (THINKS, ["data.template_kwargs={enable_thinking: false}"]),
        (THINKS, ["data.template_kwargs.enable_thinking=false"]),
        (NEEDS_ARGUMENT, ["data.template_kwargs={tools_of: {a: x}, style: a}"]),
    ],
)
def test_a_template_with_what_it_needs_makes_a_run(tmp_path: Path, template: str, settings: list[str]) -> None:
    pair_with(tmp_path, template)
    assert (
        cli.main(train_words(tmp_path, "steps=1", "evaluation.every=0", "data.max_prompt_tokens=400", *settings)) == 0
    )


@pytest.mark.parametrize(
    ("template", "settings", "said"),
    [
        (NEEDS_SYSTEM, [], "it needs a system message, set data.system_prompt"),
        (NO_SYSTEM, ["data.system_prompt=Add."], "drop data.system_prompt"),
        (NEEDS_ARGUMENT, [], "set what it misses with data.template_kwargs"),
        ("{% for m in messages %}", [], "is not valid Jinja"),
        ("{{ messages | nofilter }}", [], "is not valid Jinja"),
        (
            CHAT_TEMPLATE,
            ["data.template_kwargs={tokenize: true}"],
            "data.template_kwargs.tokenize is set by the trainer",
        ),
        (CHAT_TEMPLATE, ["data.template_kwarg={a: 1}"], "did you mean 'template_kwargs'?"),
        (CHAT_TEMPLATE, ["data.template_kwargs=3"], "data.template_kwargs=3"),
    ],
)
def test_what_helps_is_the_remedy(
    tmp_path: Path, template: str, settings: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair_with(tmp_path, template)
    assert said in refused(capsys, *train_words(tmp_path, *settings))
    assert not (tmp_path / "run").exists()


def test_a_row_with_a_system_message_in_a_template_without_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair_with(tmp_path, NO_SYSTEM)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": messages, "answer": "a"}] * 9)
    words = train_words(tmp_path, "evaluation.every=0", "data.max_prompt_tokens=20")
    assert "leave the system messages out of the data" in refused(capsys, *words)


def test_a_student_without_a_template_is_told_where_to_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pair(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "student")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "student/chat_template.jinja").unlink(missing_ok=True)
    line = refused(capsys, *train_words(tmp_path))
    assert "data.template=raw" in line
    assert "student.tokenizer" in line
    words = train_words(tmp_path, f"student.tokenizer={tmp_path / 'teacher'}", "steps=1", "evaluation.every=0")
    assert cli.main(words) == 0


def test_the_runs_system_prompt_and_arguments_are_in_prompts_and_ends_of_turns(tmp_path: Path) -> None:
    pair_with(tmp_path, NEEDS_SYSTEM + THINKS.removeprefix(CHAT_TEMPLATE))
    words = train_words(tmp_path, "data.system_prompt=Add.", "data.template_kwargs.enable_thinking=false")
    config = load_config(None, words[1:])
    tokenizer = load_tokenizer(tmp_path / "student")
    stream, _ = build_train_and_eval(config, tokenizer)
    text = tokenizer.decode(stream.dataset[0].token_ids)
    assert text.startswith("<|im_start|>system\nAdd.<|im_end|>")
    assert text.endswith("<think></think>")
    assert stream.dataset[0].answer_ids is None or stream.dataset[0].answer_ids[-1] != tokenizer.eos_token_id
    template = ChatTemplate.of(tokenizer, config.data)
    assert template.end_of_turn_id() == TURN_END
    assert ChatTemplate(tokenizer).end_of_turn_id() == TURN_END, "its own rows may bring the system message"
    assert TURN_END in stop_token_ids(template)
