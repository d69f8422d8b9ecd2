"""The texts that the models read: the short-answer prompt, and what is compared for entailment."""

from __future__ import annotations

import unicodedata
from enum import StrEnum


class PromptType(StrEnum):
    """Which instruction the generator gets."""

    default = "default"
    chat = "chat"
    long_form = "long-form"


INSTRUCTIONS = {
    PromptType.default: "Answer the following question as briefly as possible.",
    PromptType.chat: "Reply to the following question with one short sentence that is complete in itself.",
    PromptType.long_form: (
        "Answer the following question precisely and without taking sides. If it can be read in several "
        "ways, give the right answer to each of them, with a short explanation."
    ),
}

STOP_STRINGS = ("\n\n\n\n", "\n\n\n", "\n\n", "\n", "Question:", "Context:")
"""Where an answer ends, besides the end-of-sequence token; none of them is part of the answer."""


_FINAL = ".,;:!? "
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}


def build_prompt(question: str, *, context: str, prompt_type: PromptType, max_context_words: int) -> str:
    """Prompt of one condition, to be completed as plain text; a blank context leaves its line out."""
    kept = truncate_words(context, max_words=max_context_words)
    context_line = f"Context: {kept}\n" if kept.strip() else ""
    return f"{INSTRUCTIONS[prompt_type]}\n{context_line}Question: {question}\nAnswer:"


def truncate_words(text: str, *, max_words: int) -> str:
    """The first words of a text, joined by single spaces; a text that is short enough stays as it is."""
    words = text.split(maxsplit=max_words)  # what follows the last of them is one more
    return text if len(words) <= max_words else " ".join(words[:max_words])


def entailment_text(question: str, answer: str) -> str:
    """An answer in its question's setting, the way the entailment model reads it."""
    mark = "" if question.endswith("?") else "?"
    return f"{question}{mark} {answer}"


def normalise_answer(answer: str) -> str:
    """Key under which answers count as the same text.

    It leaves out case, spacing, final punctuation and one pair of quotes around all of it, and writes a
    character in one way (composed, of ordinary width). Nothing else is left out: "-5" and "5", "10\u00b2" and
    "102", "C" and "C++", "50" and "50%" stay different.
    """
    words = " ".join(_one_spelling(answer).lower().split())
    bare = words.rstrip(_FINAL)
    if len(bare) > 1 and _QUOTES.get(bare[0]) == bare[-1]:
        bare = bare[1:-1].strip().rstrip(_FINAL)
    return bare or words


def _one_spelling(text: str) -> str:
    """NFC, and the full- and half-width forms of East Asian typesetting as the characters they stand for.

    NFKC would do more than that: it takes the meaning out of superscripts and fractions.
    """
    if text.isascii():
        return text
    ordinary = (
        unicodedata.normalize("NFKC", c) if unicodedata.east_asian_width(c) in "FH" else c for c in text
    )
    return unicodedata.normalize("NFC", "".join(ordinary))
