"""Build the texts that the models read: the short-answer prompt, and answers to compare for entailment."""

from __future__ import annotations

from enum import StrEnum

from serving.answers import complete_question, truncate_words


class PromptType(StrEnum):
    """The instruction of the generator."""

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


class PromptStyle(StrEnum):
    """How the generator reads a prompt."""

    plain = "plain"
    """As text to complete."""
    chat = "chat"
    """As the user's message in the model's chat template."""


STOP_STRINGS = ("\n\n\n\n", "\n\n\n", "\n\n", "\n", "Question:", "Context:")
"""End an answer once it has begun, besides the end-of-sequence token; not part of the answer."""


def build_prompt(
    question: str,
    *,
    context: str,
    prompt_type: PromptType,
    max_context_words: int,
    prompt_style: PromptStyle = PromptStyle.plain,
) -> str:
    """Return the prompt of one condition, without a chat template; a blank context has no line."""
    kept = truncate_words(context, max_words=max_context_words)
    context_line = f"Context: {kept}\n" if kept.strip() else ""
    cue = "\nAnswer:" if prompt_style is PromptStyle.plain else ""
    return f"{INSTRUCTIONS[prompt_type]}\n{context_line}Question: {question}{cue}"


def entailment_text(question: str, answer: str) -> str:
    """Return an answer behind its question, as the entailment model reads it."""
    return f"{complete_question(question)} {answer}"
