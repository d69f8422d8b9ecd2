"""The texts that the models read: the short-answer prompt, and what is compared for entailment."""

from __future__ import annotations

from enum import StrEnum

from serving.answers import truncate_words


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


def build_prompt(question: str, *, context: str, prompt_type: PromptType, max_context_words: int) -> str:
    """Prompt of one condition, to be completed as plain text; a blank context leaves its line out."""
    kept = truncate_words(context, max_words=max_context_words)
    context_line = f"Context: {kept}\n" if kept.strip() else ""
    return f"{INSTRUCTIONS[prompt_type]}\n{context_line}Question: {question}\nAnswer:"


def entailment_text(question: str, answer: str) -> str:
    """An answer in its question's setting, the way the entailment model reads it."""
    mark = "" if question.endswith("?") else "?"
    return f"{question}{mark} {answer}"
