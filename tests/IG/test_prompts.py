from __future__ import annotations

import json

import pytest

from IG.prompts import PromptStyle, PromptType, build_prompt, entailment_text, read_prompt_file


def prompt(context: str, *, max_words: int = 4096) -> str:
    return build_prompt(
        "Where was Alice born?", context=context, prompt_type=PromptType.default, max_context_words=max_words
    )


def test_prompt_is_the_published_one() -> None:
    assert prompt("Alice was born\nin Bolton.") == (
        "Answer the following question as briefly as possible.\n"
        "Context: Alice was born\nin Bolton.\n"
        "Question: Where was Alice born?\nAnswer:"
    )


@pytest.mark.parametrize("context", ["", " ", "\n\n"])
def test_a_blank_context_is_the_baseline(context: str) -> None:
    assert prompt(context) == (
        "Answer the following question as briefly as possible.\nQuestion: Where was Alice born?\nAnswer:"
    )


def test_a_long_context_keeps_its_first_words() -> None:
    assert "Context: a b c\n" in prompt("a\nb  c d", max_words=3)
    assert "Context: a\nb  c\n" in prompt("a\nb  c", max_words=3)
    assert "Context: 東京 タ\n" in prompt("東京\nタワー", max_words=3)


def test_a_prompt_file_replaces_the_instruction_and_shows_examples() -> None:
    file = {
        "instruction": "Be short.",
        "examples": [{"question": "Who?", "context": "Bob did.", "answer": "Bob"}],
    }
    asked = dict(
        context="", prompt_type=PromptType.default, max_context_words=9, prompt_file=json.dumps(file)
    )
    assert build_prompt("When?", **asked) == (
        "Be short.\n\nContext: Bob did.\nQuestion: Who?\nAnswer: Bob\n\nQuestion: When?\nAnswer:"
    )
    chat = build_prompt("When?", **asked, prompt_style=PromptStyle.chat)  # the examples are earlier turns
    assert chat == "Be short.\nQuestion: When?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is not JSON"),
        ("[]", "expected an object with instruction"),
        ('{"examples": []}', "instruction of the object is None, expected a text"),
        ('{"instruction": "x", "examples": [1]}', r"examples\[0\] is 1, expected an object"),
        (
            '{"instruction": "x", "examples": [{"question": "?", "answer": " "}]}',
            r"answer of examples\[0\] is ' '",
        ),
    ],
)
def test_a_malformed_prompt_file_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompt_file(text)


def test_entailment_text_asks_once() -> None:
    assert entailment_text("Who?", "Bob") == "Who? Bob"
    assert entailment_text("who is he", "Bob") == "who is he? Bob"
