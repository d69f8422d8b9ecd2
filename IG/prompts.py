"""Build the texts that the models read: the short-answer prompt, and answers to compare for entailment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A question that the generator sees answered before it is asked."""

    question: str
    answer: str
    context: str
    """Empty for one that is answered from memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """What `--prompt-file` says: the instruction, and examples of the answers that are wanted."""

    instruction: str
    examples: tuple[Example, ...]


STOP_STRINGS = ("\n\n\n\n", "\n\n\n", "\n\n", "\n", "Question:", "Context:")
"""End an answer once it has begun, besides the end-of-sequence token; not part of the answer."""


def build_prompt(
    question: str,
    *,
    context: str,
    prompt_type: PromptType,
    max_context_words: int,
    prompt_style: PromptStyle = PromptStyle.plain,
    prompt_file: str = "",
) -> str:
    """Return the prompt of one condition, without a chat template; a blank context has no line.

    `prompt_file` is the text of such a file. In the plain style its examples stand before the question, in
    the chat style they are earlier turns, see `example_turns`.
    """
    file = read_prompt_file(prompt_file) if prompt_file else None
    instruction = file.instruction if file else INSTRUCTIONS[prompt_type]
    asked = _ask(question, context=truncate_words(context, max_words=max_context_words))
    if prompt_style is PromptStyle.chat:
        return f"{instruction}\n{asked}"
    if file is None:
        return f"{instruction}\n{asked}\nAnswer:"
    shown = [f"{_ask(one.question, context=one.context)}\nAnswer: {one.answer}" for one in file.examples]
    return "\n\n".join([instruction, *shown, f"{asked}\nAnswer:"])


def example_turns(prompt_file: str) -> Iterator[tuple[str, str]]:
    """Yield message and reply of every example, for a chat template; none without a prompt file."""
    if prompt_file:
        file = read_prompt_file(prompt_file)
        for one in file.examples:
            yield f"{file.instruction}\n{_ask(one.question, context=one.context)}", one.answer


def _ask(question: str, *, context: str) -> str:
    context_line = f"Context: {context}\n" if context.strip() else ""
    return f"{context_line}Question: {question}"


@lru_cache(maxsize=4)
def read_prompt_file(text: str) -> PromptFile:
    """Return what the text of a prompt file says. Raises ValueError that names what is wrong in it."""
    try:
        written = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(written, dict) or not isinstance(written.get("examples", []), list):
        raise ValueError("expected an object with instruction and examples, a list")
    return PromptFile(
        instruction=_text(written, "instruction", where="the object"),
        examples=tuple(
            _example(row, where=f"examples[{k}]") for k, row in enumerate(written.get("examples", []))
        ),
    )


def _example(row: object, *, where: str) -> Example:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {row!r}, expected an object with question and answer")
    return Example(
        question=_text(row, "question", where=where),
        answer=_text(row, "answer", where=where),
        context=_text(row, "context", where=where) if "context" in row else "",
    )


def _text(row: Mapping[str, object], name: str, *, where: str) -> str:
    found = row.get(name)
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"{name} of {where} is {found!r}, expected a text")
    return found


def entailment_text(question: str, answer: str) -> str:
    """Return an answer behind its question, as the entailment model reads it."""
    return f"{complete_question(question)} {answer}"
