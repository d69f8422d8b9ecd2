from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from IG.prompts import PromptType, build_prompt, entailment_text, normalise_answer, truncate_words


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
    assert truncate_words("a\nb  c d", max_words=3) == "a b c"
    assert truncate_words("a\nb  c", max_words=3) == "a\nb  c"


@given(st.text(alphabet="ab \n\u3000"), st.integers(1, 5))
def test_words_are_what_white_space_separates(text: str, max_words: int) -> None:
    kept = truncate_words(text, max_words=max_words)
    assert kept.split() == text.split()[:max_words]
    assert kept in (text, " ".join(kept.split()))
    assert (kept == text) or len(text.split()) > max_words


def test_entailment_text_asks_once() -> None:
    assert entailment_text("Who?", "Bob") == "Who? Bob"
    assert entailment_text("who is he", "Bob") == "who is he? Bob"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Bolton", " bolton."),
        ('"Bolton"', "Bolton"),
        ("\u201cBolton.\u201d", "Bolton"),
        ("'Bolton'.", "Bolton"),
        ("New  York", "new york!"),
        ("New\u00a0York", "New York"),
        ("caf\u00e9", "cafe\u0301"),  # composed, decomposed
        ("\uff11\uff19\uff19\uff10\uff0e", "1990"),  # full width
        ("\uff76\uff9e", "\u30ac"),  # half-width katakana with its mark apart
        ("\u6771\u4eac\u3000", "\u6771\u4eac"),  # ideographic space
        ("Yes.", "yes"),
    ],
)
def test_equal_answers(one: str, other: str) -> None:
    assert normalise_answer(one) == normalise_answer(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-5", "5"),
        ("\uff0d\uff15", "5"),  # full-width minus
        ("C", "C++"),
        ("50", "50%"),
        ("1,000", "1.000"),
        ("1,000", "1"),
        ("3.5", "35"),
        ("10\u00b2", "102"),
        ("\u00bd", "12"),
        ("5'", "5"),
        ('"', "'"),
        ("?", ""),
        ("été", "ete"),
        ("Ma\u00dfe", "Masse"),
        ("yes", "no"),
    ],
)
def test_unequal_answers(one: str, other: str) -> None:
    assert normalise_answer(one) != normalise_answer(other)


@given(st.text(max_size=12) | st.text(alphabet="aB \"'.,!?5-\u201c\u201d\uff15\u0301", max_size=8))
def test_an_answer_and_its_key_have_the_same_key(answer: str) -> None:
    key = normalise_answer(answer)
    assert normalise_answer(key) == key
    assert bool(key) == bool(answer.split())
