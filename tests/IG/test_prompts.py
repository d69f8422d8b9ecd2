from __future__ import annotations

import pytest

from IG.prompts import PromptType, build_prompt, entailment_text


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


def test_entailment_text_asks_once() -> None:
    assert entailment_text("Who?", "Bob") == "Who? Bob"
    assert entailment_text("who is he", "Bob") == "who is he? Bob"
