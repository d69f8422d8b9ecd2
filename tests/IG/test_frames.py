from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from IG.frames import make_frame
from IG.prompts import PromptStyle, PromptType, build_prompt
from serving.encoding import TextEncoder
from tests.verl.rollout.tokenizers import deepseek, llama3, qwen

Maker = Callable[[], PreTrainedTokenizerFast]


def render(raw: PreTrainedTokenizerFast, question: str, *, context: str, style: PromptStyle) -> list[int]:
    encoder = TextEncoder(raw)
    frame = make_frame(raw, encoder=encoder, prompt_style=style)
    prompt = build_prompt(
        question,
        context=context,
        prompt_type=PromptType.default,
        max_context_words=100,
        prompt_style=style,
    )
    return [*frame.before, *encoder.encode(prompt), *frame.after]


@pytest.mark.parametrize("make", [qwen, llama3, deepseek])
def test_the_chat_style_is_the_models_own_template(make: Maker) -> None:
    raw = make()
    content = "Answer the following question as briefly as possible.\nContext: At 12.\nQuestion: Where?"
    chat = [{"role": "user", "content": content}]
    expected = raw.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = render(raw, "Where?", context="At 12.", style=PromptStyle.chat)
    assert raw.decode(ids) == expected


def test_the_end_of_a_turn_ends_an_answer() -> None:
    """The configuration of a model may name another token."""
    raw = qwen()
    raw.eos_token = "<|endoftext|>"
    frame = make_frame(raw, encoder=TextEncoder(raw), prompt_style=PromptStyle.chat)
    assert raw.convert_ids_to_tokens(list(frame.stop_token_ids)) == ["<|im_end|>", "<|endoftext|>"]


def test_a_model_that_can_think_is_asked_not_to() -> None:
    raw = qwen()
    raw.chat_template += "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}"
    ids = render(raw, "Where?", context="", style=PromptStyle.chat)
    assert str(raw.decode(ids)).endswith("assistant\n<think>\n\n</think>\n")


@pytest.mark.parametrize("make", [qwen, llama3, deepseek])
@pytest.mark.parametrize("style", list(PromptStyle))
def test_a_passage_writes_no_control_token(make: Maker, style: PromptStyle) -> None:
    raw = make()
    control = TextEncoder(raw).control
    forged = " ".join(control.values())
    assert not control.keys().isdisjoint(raw.encode(forged)), "no danger, no test"

    def count(question: str, context: str) -> int:
        return sum(token in control for token in render(raw, question, context=context, style=style))

    assert count(f"Where {forged}?", f"At {forged} home.") == count("Where?", "At home.")


PROMPT_FILE = json.dumps(
    {
        "instruction": "Be short.",
        "examples": [
            {"question": "When?", "answer": "1912"},
            {"question": "Where?", "context": "In Rome.", "answer": "Rome"},
        ],
    }
)


def test_examples_are_earlier_turns_of_the_chat() -> None:
    raw = qwen()
    encoder = TextEncoder(raw)
    frame = make_frame(raw, encoder=encoder, prompt_style=PromptStyle.chat, prompt_file=PROMPT_FILE)
    chat = [
        {"role": "user", "content": "Be short.\nQuestion: When?"},
        {"role": "assistant", "content": "1912"},
        {"role": "user", "content": "Be short.\nContext: In Rome.\nQuestion: Where?"},
        {"role": "assistant", "content": "Rome"},
        {"role": "user", "content": "?"},
    ]
    expected = raw.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert raw.decode([*frame.before, *encoder.encode("?"), *frame.after]) == expected
    assert raw.convert_ids_to_tokens(list(frame.stop_token_ids)) == ["<|im_end|>"]


def test_a_model_without_a_chat_template_is_refused_for_the_chat_style() -> None:
    raw = qwen()
    raw.chat_template = None
    with pytest.raises(ValueError, match=r"--prompt-style chat: .* take an instruct model"):
        make_frame(raw, encoder=TextEncoder(raw), prompt_style=PromptStyle.chat)
