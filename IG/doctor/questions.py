"""The questions that the doctor looks at, with the documents that answer them.

    {"question": "Where did the director of The Velvet Forest study?", "answers": ["Dover University"],
     "documents": [{"text": "The director of ...", "role": "first"}, {"text": "...", "role": "second"}]}

One object per line; the parquet files of serving/questions.py are taken too and have no documents. The texts
of a question's documents are what the trained policy would read, joined by newlines.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from serving.answers import complete_question
from serving.golds import EXPECTED_GOLDS, parse_golds
from serving.questions import QuestionError, find_golds, find_question, read_rows

T = TypeVar("T")


class InputError(ValueError):
    """A file is not what the doctor can read: the message names the file, the line and what was expected."""


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
    """Every question of a JSONL or parquet file, in order. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected questions as JSONL or parquet")
    questions = _read_parquet(path) if path.suffix == ".parquet" else _read_lines(path)
    if not questions:
        raise InputError(f"{path}: it has no questions")
    return questions


def choose(population: Sequence[T], *, count: int, rng: random.Random) -> list[T]:
    """At most `count` of them, drawn without replacement, in their order."""
    chosen = sorted(rng.sample(range(len(population)), min(count, len(population))))
    return [population[index] for index in chosen]


def read_json_lines(path: Path) -> list[tuple[str, Mapping[str, object]]]:
    """Where it stands and what it is, of every line that is not blank. Raises InputError."""
    objects: list[tuple[str, Mapping[str, object]]] = []
    try:
        with path.open("rb") as file:  # bytes: the line that is not UTF-8 has a number, too
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                if line.strip():
                    objects.append((where, _parse_line(line, where=where)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected JSONL") from None
    return objects


def require_golds(value: object, *, where: str, name: str) -> tuple[str, ...]:
    """Return accepted answers; an empty list has none. Raises InputError."""
    golds = parse_golds(value)
    if not golds and value != []:
        refuse(where, name, value, EXPECTED_GOLDS)
    return golds


def require_text(value: object, *, where: str, name: str) -> str:
    """A text that is not blank. Raises InputError."""
    if not isinstance(value, str) or not value.strip():
        refuse(where, name, value, "a text that is not empty")
    return require_whole(value, where=where, name=name)


def require_whole(text: str, *, where: str, name: str) -> str:
    """JSON can spell half a character, a lone surrogate; no tokenizer can read it. Raises InputError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(
            f"{where}: {name} has {half!r} at character {error.start}, half a character, expected text"
        ) from None
    return text


def refuse(where: str, name: str, value: object, expected: str) -> NoReturn:
    """Raise the InputError."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    raise InputError(f"{where}: {name} is {shown}, expected {expected}")


def _parse_line(line: bytes, *, where: str) -> Mapping[str, object]:
    try:
        parsed: object = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of the bytes, the grammar, huge numbers, deep nesting
        raise InputError(f"{where}: not JSON in UTF-8 ({error})") from None
    if not isinstance(parsed, dict):
        refuse(where, "the line", parsed, "a JSON object")
    return parsed


def _read_lines(path: Path) -> list[AskedQuestion]:
    return [
        AskedQuestion(
            text=complete_question(require_text(fields.get("question"), where=where, name="question")),
            golds=require_golds(fields.get("answers", []), where=where, name="answers"),
            documents=_documents(fields.get("documents", []), where=where),
        )
        for where, fields in read_json_lines(path)
    ]


def _documents(value: object, *, where: str) -> tuple[Document, ...]:
    if not isinstance(value, list):
        refuse(where, "documents", value, "a list of objects with text and role")
    documents = []
    for k, fields in enumerate(value):
        name = f"documents[{k}]"
        if not isinstance(fields, dict):
            refuse(where, name, fields, "an object with text and role")
        text = require_text(fields.get("text"), where=where, name=f"{name}.text")
        role = require_text(fields.get("role"), where=where, name=f"{name}.role")
        documents.append(Document(text=text, role=role))
    return tuple(documents)


def _read_parquet(path: Path) -> list[AskedQuestion]:
    try:
        return [
            AskedQuestion(
                text=complete_question(
                    require_whole(find_question(row, where=where), where=where, name="question")
                ),
                golds=find_golds(row, where=where),
                documents=(),
            )
            for where, row in read_rows(path)
        ]
    except QuestionError as error:
        raise InputError(str(error)) from None
