"""Read the questions that the doctor examines, and build the contexts whose gains it measures.

    {"question": "Where did the director of The Velvet Forest study?", "answers": ["Dover University"],
     "documents": [{"text": "The director of ...", "role": "first"}, {"text": "...", "role": "second"}]}

One object per line. The other files of serving/questions.py are read too; they have no documents. The texts
of a question's documents are what the trained policy would read, joined by newlines.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from serving.answers import complete_question
from serving.questions import (
    QuestionError,
    Row,
    find_golds,
    find_question,
    read_rows,
    refuse,
    require_text,
)

FIRST = "first"
"""Role of the document that a chain of facts begins with."""


class Scenario(StrEnum):
    """What a search found for a question; the value is the name of its row in the table."""

    none = "no document"
    first = "only the first document"
    rest = "only the other documents"
    supporting = "all supporting documents"
    random = "random documents"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text that helps to answer a question."""

    text: str
    role: str
    """`first`, `second`, ...: its place in the chain of facts that leads to the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedQuestion:
    """One question with its gold answers and supporting documents."""

    text: str
    golds: tuple[str, ...]
    """Accepted answers; may be empty with `--gain entropy`."""
    documents: tuple[Document, ...]
    """All that is needed to answer; empty when unknown."""


def read_questions(path: Path) -> list[AskedQuestion]:
    """Return every question of a file, in order. Raises QuestionError."""
    if not path.is_file():
        raise QuestionError(f"{path}: no such file; expected questions as JSON or parquet")
    questions = [_parse(row, where=where) for where, row in read_rows(path)]
    if not questions:
        raise QuestionError(f"{path}: it has no questions")
    return questions


def choose(questions: Sequence[AskedQuestion], *, count: int, seed: int) -> list[AskedQuestion]:
    """Draw at most `count` questions without replacement and return them in file order."""
    rng = random.Random(seed)
    return [questions[at] for at in sorted(rng.sample(range(len(questions)), min(count, len(questions))))]


def contexts_of(
    question: AskedQuestion, *, others: Sequence[AskedQuestion], rng: random.Random
) -> dict[Scenario, str]:
    """Return the context of every scenario that the question has; `none` is always first and blank.

    Random documents are drawn from `others`, never documents of the question itself.
    """
    contexts = {Scenario.none: ""}
    texts = [document.text for document in question.documents]
    if not texts:
        return contexts
    first = [document.text for document in question.documents if document.role == FIRST]
    rest = [document.text for document in question.documents if document.role != FIRST]
    if first and rest:
        contexts[Scenario.first] = "\n".join(first)
        contexts[Scenario.rest] = "\n".join(rest)
    contexts[Scenario.supporting] = "\n".join(texts)
    pool = list(dict.fromkeys(document.text for other in others for document in other.documents))
    foreign = [text for text in pool if text not in texts]
    if len(foreign) >= len(texts):
        contexts[Scenario.random] = "\n".join(rng.sample(foreign, len(texts)))
    return contexts


def _parse(row: Row, *, where: str) -> AskedQuestion:
    return AskedQuestion(
        text=complete_question(find_question(row, where=where)),
        golds=find_golds(row, where=where, optional=True),
        documents=_documents(row.get("documents"), where=where),
    )


def _documents(value: object, *, where: str) -> tuple[Document, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        refuse(value, where=where, name="documents", expected="a list of objects with text and role")
    documents = []
    for k, fields in enumerate(value):
        name = f"documents[{k}]"
        if not isinstance(fields, dict):
            refuse(fields, where=where, name=name, expected="an object with text and role")
        text = require_text(fields.get("text"), where=where, name=f"{name}.text")
        role = require_text(fields.get("role"), where=where, name=f"{name}.role")
        documents.append(Document(text=text, role=role))
    return tuple(documents)
