"""The questions that the doctor looks at, with the documents that answer them.

    {"question": "Where did the director of The Velvet Forest study?", "answers": ["Dover University"],
     "documents": [{"text": "The director of ...", "role": "first"}, {"text": "...", "role": "second"}]}

One object per line; the other files of serving/questions.py are read too and have no documents. The texts of
a question's documents are what the trained policy would read, joined by newlines.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

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

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text that helps to answer a question."""

    text: str
    role: str
    """`first`, `second`, ...: its place in the chain of facts that leads to the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedQuestion:
    """One question."""

    text: str
    golds: tuple[str, ...]
    """Accepted answers; may be empty when the gain is the drop of entropy."""
    documents: tuple[Document, ...]
    """All that is needed to answer; empty when nobody knows."""


def read_questions(path: Path) -> list[AskedQuestion]:
    """Return every question of a file, in order. Raises QuestionError."""
    if not path.is_file():
        raise QuestionError(f"{path}: no such file; expected questions as JSON or parquet")
    questions = [_parse(row, where=where) for where, row in read_rows(path)]
    if not questions:
        raise QuestionError(f"{path}: it has no questions")
    return questions


def choose(population: Sequence[T], *, count: int, rng: random.Random) -> list[T]:
    """At most `count` of them, drawn without replacement, in their order."""
    chosen = sorted(rng.sample(range(len(population)), min(count, len(population))))
    return [population[index] for index in chosen]


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
