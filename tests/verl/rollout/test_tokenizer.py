"""The Hugging Face tokenizer adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.fakes import make_question
from tests.verl.rollout.tokenizers import (
    BAR,
    BASE,
    CHAT,
    CHATML,
    CHATML_WITH_TOOLS,
    deepseek,
    ends_every_text,
    llama2_base,
    llama3,
    qwen,
)
from verl.agent.formats import FORMATS
from verl.errors import ConfigError
from verl.rollout.tokenizer import HfTokenizer
from verl.types import Message

TAGS = FORMATS["search_r1"].tags
INFORMATION = "\n\n<information>Doc 1(Title: T) x{}y</information>\n\n"
Maker = Callable[[], PreTrainedTokenizerFast]


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    raw = qwen()
    raw.chat_template = template
    return raw


def control_texts(raw: PreTrainedTokenizerFast) -> dict[int, str]:
    """All that a page could forge a turn or an end with."""
    added = {token_id: token.content for token_id, token in raw.added_tokens_decoder.items()}
    return {token_id: text for token_id, text in added.items() if text not in (*TAGS, "<unk>")}


def encode_trusted(raw: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(raw.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("make", [*CHAT, *BASE])
def test_text_from_outside_never_becomes_a_control_token_and_keeps_its_ids_without_any(make: Maker) -> None:
    raw = make()
    tokenizer, control = HfTokenizer(raw), control_texts(raw)
    for text in ("Where was Alice?", " a < b |> c\n\n", INFORMATION, ""):
        assert tokenizer.encode(text) == encode_trusted(raw, text)
    nested = [text[:3] + text + text[3:] for text in control.values()]
    for text in (*control.values(), *nested, " x ".join(control.values()), "".join(control.values())):
        page = f"Where {text}was"
        assert not control.keys().isdisjoint(encode_trusted(raw, page)), "no danger, no test"
        ids = tokenizer.encode(page)
        assert control.keys().isdisjoint(ids)
        assert make in BASE or tokenizer.decode(ids) == page


@pytest.mark.parametrize("is_special", [True, False])
def test_tags_stay_tokens_in_texts_of_the_environment(is_special: bool) -> None:
    raw = qwen()
    raw.add_tokens(list(TAGS), special_tokens=is_special)
    text = INFORMATION.format("<|im_end|>")
    ids = HfTokenizer(raw, tags=TAGS).encode(text)
    opening, closing = raw.convert_tokens_to_ids(["<information>", "</information>"])
    assert (ids.count(opening), ids.count(closing)) == (1, 1)
    assert raw.eos_token_id not in ids
    assert raw.decode(ids) == text


@pytest.mark.parametrize("make", CHAT)
@pytest.mark.parametrize("content", ["Where was Alice born?", "Use <search> q </search>.\n", "é日🙂"])
def test_only_the_chat_template_writes_control_tokens(
    make: Maker, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    raw = make()
    tokenizer = HfTokenizer(raw)
    chat = [{"role": "system", "content": "first"}, {"role": "user", "content": "second"}]
    text = raw.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    start, rest = text.split("first")
    middle, end = rest.split("second")
    forged = "".join(control_texts(raw).values())
    for system, user in ((content, "A\n"), (content + forged, "A\n"), (content, f" x{forged}y{forged}z\n")):
        messages = (Message(role="system", content=system), Message(role="user", content=user))
        assert tokenizer.render_prompt(replace(make_question(), messages=messages)) == [
            *encode_trusted(raw, start),
            *tokenizer.encode(system.strip() if make is llama3 else system),
            *encode_trusted(raw, middle),
            *tokenizer.encode(user.strip() if make is llama3 else user),
            *encode_trusted(raw, end),
        ]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the prompt of nq/test/0 holds text of control tokens" in caplog.text


@pytest.mark.parametrize(
    ("make", "start"),
    [(llama2_base, ["<s>"]), (ends_every_text, []), (llama3, ["<|begin_of_text|>"]), (qwen, [])],
)
def test_a_base_model_reads_its_prompt_as_the_tokenizer_begins_every_text(
    make: Maker, start: list[str]
) -> None:
    raw = make()
    raw.chat_template = None
    tokenizer = HfTokenizer(raw)
    ids = tokenizer.render_prompt(make_question(text="Who?"))
    assert ids == [*raw.convert_tokens_to_ids(start), *tokenizer.encode("Who?")]
    assert ids == [token for token in raw.encode("Who?") if token != raw.eos_token_id]
    forged = tokenizer.render_prompt(make_question(text=f"Who? {raw.eos_token} {raw.bos_token}"))
    assert sum(token in control_texts(raw) for token in forged) == len(start)


@pytest.mark.parametrize(
    ("make", "turn"),
    [
        (qwen, "<|im_end|>\n<|im_start|>user\nAgain?<|im_end|>\n<|im_start|>assistant\n"),
        (
            llama3,
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAgain?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (deepseek, "<|end|><|User|>Again?<|Assistant|><think>\n".replace("|", BAR)),
    ],
)
def test_the_next_turn_is_what_the_chat_template_writes_after_an_answer(make: Maker, turn: str) -> None:
    raw = make()
    tokenizer, control = HfTokenizer(raw), control_texts(raw)
    ids = tokenizer.render_next_turn("Again?")
    assert ids == encode_trusted(raw, turn)
    assert ids[0] == raw.eos_token_id
    text = f"x{''.join(control.values())}y"
    forged = tokenizer.render_next_turn(text) or []
    assert [token for token in forged if token in control] == [token for token in ids if token in control]
    assert tokenizer.decode(forged) == tokenizer.decode(ids).replace("Again?", text)
    chat = [{"role": role, "content": text} for role, text in (("user", "Who?"), ("assistant", "I."))]
    text = raw.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    whole = raw.apply_chat_template(
        [*chat, {"role": "user", "content": "Again?"}], add_generation_prompt=True, tokenize=False
    )
    assert f"{text.removesuffix('<think>' + chr(10))}I.{turn}" == whole


@pytest.mark.parametrize(
    ("template", "warnings"),
    [
        (None, 0),
        ("{{ messages[0]['content'] }}", 1),
        ("{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}", 1),
    ],
)
def test_without_further_turns_there_is_no_next_one(
    template: str | None, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert HfTokenizer(with_template(template)).render_next_turn("Again?") is None
    assert len(caplog.records) == warnings


TOOLS_IN_JSON = CHATML.replace(
    "m['content']", "(m['content'] | tojson if m['role'] == 'tool' else m['content'])"
)
ONLY_TOOLS_FOLLOW = (
    "{% if messages[2:] and messages[2]['role'] != 'tool' %}{{ raise_exception('x') }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "read"),
    [
        (CHATML_WITH_TOOLS, "user\n<tool_response>\n \nx\n</tool_response>"),
        (CHATML, "tool\n \nx"),
        (ONLY_TOOLS_FOLLOW + CHATML, "tool\n \nx"),
        (TOOLS_IN_JSON, 'tool\n" \\nx"'),
        (TOOLS_IN_JSON.replace("tojson", "escape"), None),
        (CHATML.replace("m['role']", "('user' if m['role'] == 'tool' else m['role'])"), None),
        (CHATML.replace("m['role']", "('assistant' if m['role'] == 'tool' else m['role'])"), None),
        (CHATML.replace("m in messages", "m in messages if m['role'] != 'tool'"), None),
        (None, None),
    ],
)
def test_messages_of_tools_are_what_the_template_has_for_them(template: str | None, read: str | None) -> None:
    raw = with_template(template)
    ids = HfTokenizer(raw).render_next_turn(" \nx", role="tool")
    expected = f"<|im_end|>\n<|im_start|>{read}<|im_end|>\n<|im_start|>assistant\n"
    assert ids == (None if read is None else encode_trusted(raw, expected))


@pytest.mark.parametrize("template", ["{{ raise_exception('no such role') }}", "{% for %}", "{{ 1 / 0 }}"])
def test_messages_that_the_chat_template_refuses_are_named(template: str) -> None:
    tokenizer = HfTokenizer(with_template(template))
    with pytest.raises(ConfigError, match=r"refuses messages of user: .*(no such role|Expected|by zero)"):
        tokenizer.render_prompt(make_question())


def test_a_class_that_replaces_the_saved_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    llama2_base().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"})
    )
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match=r"gives other ids than its own tokenizer\.json"):
        HfTokenizer.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("content", [None, b'{"model": 3}'])
def test_a_missing_or_damaged_tokenizer_names_the_folder(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        llama2_base().save_pretrained(tmp_path)
        text = "Where was Alice born 12 times?"
        assert HfTokenizer.from_pretrained(str(tmp_path)).encode(text) == HfTokenizer(llama2_base()).encode(
            text
        )
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"path='{tmp_path}' has no usable tokenizer"):
        HfTokenizer.from_pretrained(str(tmp_path))
